"""Commands of ``easyedit-rls``: hydra programs, one a module."""
