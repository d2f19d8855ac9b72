"""The ledger: edits on disk, each of them there when it was reported as done."""

from easyedit_rls.ledger.ledger import Ledger, Place

__all__ = ["Ledger", "Place"]
