"""The ledger: a folder with the journals of one model, one of them in use, and the lock that keeps writers
apart.

ledger.lock       held by the one editor that writes
ledger.json       format, and which journal is in use
journal-0001/     all that was edited, from the first batch on (see `journal`)
journal-0002/     after edits were forgotten (`reset`) or compacted
set-aside/        what was found here and has no place in a ledger, or lay behind the last event that counts

An event is done when one file has been renamed into place: the head of the journal, or for a new journal
`ledger.json`. Every step before that leaves the ledger as it was; every step after it can be missed. What a
writer takes for done is a `Place`; where the disk and its own last attempt say something else, the disk is
put back first, and where somebody else wrote, nothing is touched.
"""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from easyedit_rls._base.files import PARTIAL, make_folder, sync_folder, user_path, write_file
from easyedit_rls._base.interrupts import deferred_interrupts
from easyedit_rls.errors import InputError, LedgerError
from easyedit_rls.ledger.files import journal_number, open_regular, read_small
from easyedit_rls.ledger.journal import (
    HEAD,
    SPARE,
    Event,
    Journal,
    Position,
    commit_file,
    create,
    prepare,
    put_back,
    restore,
)
from easyedit_rls.ledger.line import Line
from easyedit_rls.ledger.reading import POINTER, journals, latest, newest, pointer_of, read_pointer
from easyedit_rls.ledger.tidy import tidy

logger = logging.getLogger(__name__)

LOCK = "ledger.lock"
_SPARE = "ledger.json.before"


@dataclass(frozen=True)
class Place:
    """Where a writer takes its ledger to be.

    Attributes:
        folder: of the journal in use; None before the first batch.
        position: in it.
    """

    folder: Path | None = None
    position: Position = field(default_factory=Position)

    @property
    def is_recorded(self) -> bool:
        """Whether there is a journal that takes more."""
        return self.folder is not None and not self.position.is_closed

    @property
    def mark(self) -> "_Mark":
        """What the disk says if it is there."""
        return (None, None) if self.folder is None else (self.folder.name, self.position.head)


@dataclass
class _Attempt:
    """What was begun to be written and may have come to the disk or not."""

    journal: Path
    files: tuple[str, ...] = ()
    is_new: bool = False
    head: bytes | None = None  # once it is known

    @property
    def mark(self) -> "_Mark":
        return self.journal.name, self.head


_Mark = tuple[str | None, bytes | None]  # which journal is in use, and its head


class Ledger:
    """The state of one model on disk: every batch that was reported as done, and how to come back to it.

    Args:
        folder: made if missing.

    Raises:
        LedgerError: another editor holds it, it is of a later version, or the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            if "\0" in str(folder):
                raise ValueError("there is a zero byte in its name")
            self.folder = _whole(folder)
            read_pointer(self.folder)  # a later version's ledger is left alone
        except (OSError, ValueError, InputError) as exc:
            if isinstance(exc, LedgerError):
                raise
            raise LedgerError(
                f"{str(folder)!r} can't be a ledger's folder: {str(exc).rstrip('.')}. Give another state_dir."
            ) from exc
        self._lock = FileLock(self.folder / LOCK, thread_local=False)  # any thread may write, in its turn
        self._pid, self._is_tidy = os.getpid(), False
        self._attempt: _Attempt | None = None
        try:
            make_folder(self.folder)
            _refuse_unless_own(self.folder / LOCK)
            self._lock.acquire(blocking=False)
            self._identity = _identity(self.folder / LOCK)
        except Timeout as exc:
            raise LedgerError(
                f"The ledger in {self.folder} is held by another editor, in this process or another. "
                "Close that one (close(), or let the process end), or give this one a folder of its own."
            ) from exc
        except LedgerError:
            raise
        except OSError as exc:
            self._lock.release()
            raise self._unwritable(exc) from exc

    def is_at(self, folder: str | Path) -> bool:
        """Whether this is the ledger of that folder."""
        try:
            return self.folder == _whole(Path(folder))
        except RuntimeError:  # a home that nobody has
            return False

    def open(self) -> Journal | None:
        """The journal in use; None before the first batch. Nothing is written, nor cleared away.

        Raises:
            LedgerError: it is damaged.
        """
        return latest(self.folder)

    def place(self) -> Place:
        """Where the disk is."""
        journal = self.open()
        return Place() if journal is None else Place(journal.folder, journal.position)

    def record(self, place: Place, event: Event) -> tuple[Place, Line]:
        """Write an event down: when this returns it is on disk, and if it raises the ledger is as before.

        Args:
            place: where the ledger is.
            event: what happened.

        Returns:
            Where the ledger is now, and the line as it was written.

        Raises:
            LedgerError: the disk is full, read only or failing, or somebody else wrote.
        """
        assert place.folder is not None
        with self._writing(place):
            self._attempt = _Attempt(place.folder, tuple(event.files))
            position, lines = prepare(place.folder, place.position, [event])
            self._attempt.head = position.head
            commit_file(place.folder / HEAD, place.folder / SPARE, position.head, place.position.head)
            return Place(place.folder, position), lines[-1]

    def begin(
        self,
        place: Place,
        files: Mapping[str, bytes],
        beginning: Mapping[str, Any],
        parts: Iterable[Sequence[Event]],
    ) -> tuple[Place, Line]:
        """Begin a new journal; it counts with all events that it begins with, or not at all.

        Args:
            place: where the ledger is.
            files: manifest and prior.
            beginning: what the history begins with.
            parts: events, as many at a time as memory shall hold.

        Returns:
            Where the ledger is now, and the last line as it was written.

        Raises:
            LedgerError: the disk is full, read only or failing, or somebody else wrote.
        """
        with self._writing(place):
            number = max((journal_number(path.name) or 0 for path in journals(self.folder)), default=0) + 1
            final = self.folder / f"journal-{number:04d}"
            aside = final.with_name(final.name + PARTIAL)
            self._attempt = _Attempt(final, is_new=True)
            position, lines = create(aside, files, beginning)
            for events in parts:
                position, lines = prepare(aside, position, events)
            write_file(aside / HEAD, position.head)
            self._attempt.head = position.head
            os.rename(aside, final)
            sync_folder(self.folder)
            pointer = self.folder / POINTER
            commit_file(
                pointer,
                self.folder / _SPARE,
                pointer_of(final.name),
                read_small(pointer) if pointer.exists() else None,
            )
            return Place(final, position), lines[-1]

    def put_back(self, place: Place) -> None:
        """Make the disk say what the writer takes for done. Where it doesn't allow even that, it is tried
        again before the next event.
        """
        if self._attempt is None or self._attempt.mark == place.mark:
            return
        try:
            self._check_writer()
            if self._found() not in (place.mark, self._attempt.mark):
                raise self._foreign()
            with deferred_interrupts():
                self._undo(place, self._attempt)
        except (OSError, LedgerError) as exc:
            logger.warning("The ledger in %s could not be put back: %s", self.folder, exc)

    def settle(self, place: Place) -> None:
        """The last chance to put back what could not be: an event that was told of as failed must not be
        found by the next editor.

        Raises:
            LedgerError: it still can't be.
        """
        if self._attempt is not None and self._attempt.mark != place.mark:
            with self._writing(place):
                pass

    def remove(self, keep: Path) -> None:
        """Remove the journals before one that holds all that counts of them.

        Raises:
            LedgerError: the disk doesn't allow it. They don't count any more.
        """
        self._check_writer()
        older = [
            path
            for path in journals(self.folder)
            if (journal_number(path.name) or 0) < (journal_number(keep.name) or 0)
        ]
        try:
            for path in older:
                if path.is_dir() and not path.is_symlink():
                    gone = path.with_name(path.name + PARTIAL)  # so that no half journal can be met
                    path.rename(gone)
                    shutil.rmtree(gone)
        except OSError as exc:
            raise LedgerError(
                f"Journals before {keep} can't be removed: {exc.strerror or exc}. "
                "They count no more: remove them."
            ) from exc

    def close(self) -> None:
        """Let other editors have it. In a forked process nothing happens: the lock is the parent's."""
        if os.getpid() == self._pid:
            self._lock.release()

    @contextmanager
    def _writing(self, place: Place) -> Iterator[None]:
        """The steps inside are undone if one of them fails."""
        self._check_writer()
        try:
            self._check_disk(place)
            yield
        except BaseException as exc:
            self.put_back(place)
            if isinstance(exc, OSError) and not isinstance(exc, LedgerError):
                raise self._unwritable(exc) from exc
            raise

    def _undo(self, place: Place, attempt: _Attempt) -> None:
        if attempt.is_new:
            pointer = self.folder / POINTER
            if pointer.exists() and read_small(pointer) == pointer_of(attempt.journal.name):
                if place.folder is None:
                    pointer.unlink()
                else:
                    restore(pointer, self.folder / _SPARE, pointer_of(place.folder.name))
            for path in (attempt.journal, attempt.journal.with_name(attempt.journal.name + PARTIAL)):
                if path.exists():
                    shutil.rmtree(path)
        else:
            assert place.folder is not None
            put_back(place.folder, place.position)
            for name in attempt.files:
                (place.folder / name).unlink(missing_ok=True)
                (place.folder / (name + PARTIAL)).unlink(missing_ok=True)
        self._attempt = None

    def _check_writer(self) -> None:
        """Whether this is still the one that may write.

        Raises:
            LedgerError: it is not.
        """
        if os.getpid() != self._pid:
            raise LedgerError(
                f"The ledger in {self.folder} belongs to process {self._pid}, "
                "from which this one was forked. Make a new editor here, with a state_dir of its own."
            )
        if not self._lock.is_locked:
            raise LedgerError(
                f"The ledger in {self.folder} was closed. Make a new editor with the same state_dir."
            )
        if _identity(self.folder / LOCK) != self._identity:
            raise LedgerError(
                f"The lock of the ledger in {self.folder} was taken away ({LOCK} was removed or replaced): "
                "another editor may write there. "
                "Close this editor and make a new one with the same state_dir."
            )

    def _check_disk(self, place: Place) -> None:
        """See that the disk is where the writer takes it to be; before the first event, set aside what has no
        place here.

        Raises:
            LedgerError: somebody else wrote.
        """
        found = self._found()
        if self._attempt is not None:
            if found not in (place.mark, self._attempt.mark):
                raise self._foreign()
            if self._attempt.mark == place.mark:
                self._attempt = None
            else:
                self._undo(place, self._attempt)
                found = self._found()
        if found != place.mark:
            raise self._foreign()
        if not self._is_tidy:
            tidy(self.folder, place.folder)
            pointer = self.folder / POINTER
            if place.folder is not None and not pointer.exists():  # a ledger of the first format
                commit_file(pointer, self.folder / _SPARE, pointer_of(place.folder.name), None)
            self._is_tidy = True

    def _found(self) -> _Mark:
        """Where the disk is."""
        folder = newest(self.folder)
        return (None, None) if folder is None else (folder.name, read_small(folder / HEAD))

    def _foreign(self) -> LedgerError:
        return LedgerError(
            f"The ledger in {self.folder} was written by somebody else since this editor did. "
            "Nothing was changed; close this editor, and "
            "make a new one of the unedited model with the same state_dir."
        )

    def _unwritable(self, exc: OSError) -> LedgerError:
        if self._attempt is None:
            done = "Nothing was changed; make room or mend the permissions, then try again."
        else:
            done = (
                "What was begun can't be taken back either; that is tried again before the next change, "
                "and by close(). Mend the disk."
            )
        return LedgerError(f"The ledger in {self.folder} can't be written: {exc.strerror or exc}. {done}")


def _whole(folder: Path) -> Path:
    return user_path(folder).absolute()


def _refuse_unless_own(path: Path) -> None:
    """Refuse a lock file that is a link or no file: the lock would be taken, and the file cut, somewhere
    else.
    """
    if path.exists() or path.is_symlink():
        os.close(open_regular(path))


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one that got its name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
