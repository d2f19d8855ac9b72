"""Where EasyEdit is: importable, or at ``EASYEDIT_HOME``."""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from easyedit_rls._base.files import user_path
from easyedit_rls.errors import HostError

_CLONE = "git clone https://github.com/zjunlp/EasyEdit, and set EASYEDIT_HOME to its folder."


def easyeditor_is_there() -> bool:
    """Whether `easyeditor` would find a package to import; imports nothing."""
    home = os.environ.get("EASYEDIT_HOME")
    if "easyeditor" in sys.modules:
        return True
    return is_checkout(user_path(home)) if home else importlib.util.find_spec("easyeditor") is not None


def easyeditor() -> ModuleType:
    """Import EasyEdit and return its package.

    A package that is already imported is taken as it is; then the checkout at ``EASYEDIT_HOME``, then what
    Python finds by itself. Importing it seeds the global random generators with 42 and configures logging, as
    it does for every EasyEdit script.

    Raises:
        HostError: there is no checkout, or it can't be imported.
    """
    if "easyeditor" in sys.modules:
        return sys.modules["easyeditor"]
    home = os.environ.get("EASYEDIT_HOME")
    if home:
        add_checkout(user_path(home))
    elif importlib.util.find_spec("easyeditor") is None:
        raise HostError(f"EasyEdit is not importable and EASYEDIT_HOME is not set. {_CLONE}")
    try:
        return importlib.import_module("easyeditor")
    except ImportError as exc:
        raise HostError(
            f"EasyEdit is there but can't be imported: {exc}. Install what its requirements.txt lists."
        ) from exc


def add_checkout(home: Path) -> None:
    """Put a checkout in front of the import path.

    Raises:
        HostError: the folder holds no EasyEdit.
    """
    home = home.absolute()
    if not is_checkout(home):
        raise HostError(f"{home} holds no EasyEdit (no easyeditor/__init__.py). {_CLONE}")
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))


def is_checkout(folder: Path) -> bool:
    """Whether a folder is a checkout of EasyEdit."""
    return (folder / "easyeditor" / "__init__.py").is_file()
