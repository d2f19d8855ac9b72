"""The state on disk: see `Ledger`."""

from easyedit_rls.ledger.ledger import Ledger

__all__ = ["Ledger"]
