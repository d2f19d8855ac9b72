"""The ledger: a folder with the journals of one model, one of them in use, and the lock that keeps writers apart.

ledger.lock       held by the one editor that writes
journal-0001/     all that was edited, from the first batch on (see `journal`)
journal-0002/     after edits were forgotten (`reset`) or compacted: the highest number counts
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from easyedit_rls.errors import LedgerError
from easyedit_rls.files import PARTIAL, sync_folder
from easyedit_rls.history import Entry
from easyedit_rls.ledger.journal import Journal

logger = logging.getLogger(__name__)

_LOCK = "ledger.lock"


class Ledger:
    """The state of one model on disk: every batch that was reported as done, and how to come back to it.

    Args:
        folder: made if missing.

    Raises:
        LedgerError: another editor holds it, or the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self._lock = FileLock(self.folder / _LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(blocking=False)
            for path in self.folder.glob(f"journal-*{PARTIAL}"):
                shutil.rmtree(path)
        except Timeout as exc:
            raise LedgerError(
                f"The ledger in {self.folder} is held by another editor, in this process or another. Close that one (close(), or let the "
                "process end), or give this one a folder of its own."
            ) from exc
        except OSError as exc:
            self._lock.release()
            raise LedgerError(f"The ledger in {self.folder} can't be written: {exc.strerror or exc}. Mend the permissions.") from exc

    def is_at(self, folder: str | Path) -> bool:
        """Whether this is the ledger of that folder."""
        return self.folder == Path(folder).expanduser().absolute()

    def open(self) -> Journal | None:
        """The journal in use, cleared of what an interrupted writer left; None before the first batch and after a reset."""
        journal = latest(self.folder)
        if journal is None:
            return None
        try:
            journal.clear_debris()
        except OSError as exc:
            raise LedgerError(f"The ledger in {self.folder} can't be written: {exc.strerror or exc}. Mend the permissions.") from exc
        return None if journal.is_closed else journal

    def begin(self, files: Mapping[str, bytes], entry: Entry, data: Mapping[str, Tensor]) -> Journal:
        """Begin a new journal; it appears with its first entry in it, or not at all.

        Args:
            files: manifest and prior.
            entry: the first change.
            data: its tensors.

        Raises:
            LedgerError: the disk is full, read only or failing.
        """
        partial = self.reserve()
        try:
            Journal.create(partial, files).append_entry(entry, data)
            return self.publish(partial)
        except BaseException as exc:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(exc, OSError) and not isinstance(exc, LedgerError):
                raise LedgerError(
                    f"The ledger in {self.folder} can't be written: {exc.strerror or exc}. Nothing was changed; make room or mend the "
                    "permissions, then edit again."
                ) from exc
            raise

    def reserve(self) -> Path:
        """Folder for a new journal to be written aside, see `publish`."""
        number = max((int(path.name[8:]) for path in journals(self.folder)), default=0) + 1
        return self.folder / f"journal-{number:04d}{PARTIAL}"

    def publish(self, partial: Path) -> Journal:
        """Make a journal that was written aside the one in use."""
        final = partial.with_name(partial.name.removesuffix(PARTIAL))
        os.rename(partial, final)
        try:
            sync_folder(self.folder)
            return Journal(final)
        except BaseException:
            os.rename(final, partial)
            raise

    def close(self) -> None:
        """Let other editors have it."""
        self._lock.release()


def journals(folder: Path) -> list[Path]:
    """Folders of all journals, oldest first."""
    return sorted(path for path in folder.glob("journal-*") if path.name[8:].isdigit())


def latest(folder: Path) -> Journal | None:
    """The newest journal, for reading; None if there is none.

    Raises:
        LedgerError: it is damaged.
    """
    found = journals(folder)
    return Journal(found[-1]) if found else None
