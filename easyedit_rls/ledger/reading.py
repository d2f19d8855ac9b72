"""Which journal of a ledger is in use, and how it is read while an editor writes: all of one moment, or once
more.
"""

import contextlib
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from easyedit_rls.errors import LedgerError
from easyedit_rls.ledger.files import canonical, journal_number, parsed, read_small
from easyedit_rls.ledger.journal import FORMAT, HEAD, Journal

T = TypeVar("T")

POINTER = "ledger.json"
_TRIES = 40  # of a reader beside a writer
_PAUSE_S = 0.02


def journals(folder: Path) -> list[Path]:
    """Folders of all journals, oldest first."""
    numbered = [
        (number, path)
        for path in folder.glob("journal-*")
        if (number := journal_number(path.name)) is not None
    ]
    return [path for _, path in sorted(numbered)]


def newest(folder: Path) -> Path | None:
    """Folder of the journal in use; None if there is none.

    Raises:
        LedgerError: it is missing, or the ledger is of a later version.
    """
    name = read_pointer(folder)
    if name is None:
        return next(reversed(journals(folder)), None)
    if not (folder / name).is_dir():
        raise LedgerError(
            f"{folder / name} is missing, although {POINTER} says that it is in use. "
            "Put it back from a backup."
        )
    return folder / name


def latest(folder: Path) -> Journal | None:
    """The journal in use, for reading; None if there is none.

    Raises:
        LedgerError: it is damaged, missing, or of a later version.
    """
    found = newest(folder)
    return None if found is None else Journal(found)


def read_pointer(folder: Path) -> str | None:
    """Name of the journal in use; None in ledgers of the first format, and before the first batch.

    Raises:
        LedgerError: the file is damaged, or of a later version.
    """
    path = folder / POINTER
    if not (path.exists() or path.is_symlink()):
        return None
    raw = read_small(path)
    values = parsed(path, lambda: json.loads(raw))
    if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] > FORMAT:
        raise LedgerError(
            f"{path} has format {values['format']}; this version reads up to {FORMAT}. "
            "Use the package that wrote it."
        )
    name = values.get("journal") if isinstance(values, dict) else None
    if not isinstance(name, str) or journal_number(name) is None or raw != pointer_of(name):
        raise LedgerError(f"{path} is damaged. Put it back from a backup.")
    return name


def at_one_moment(folder: Path, read: Callable[[Journal], T]) -> T:
    """What a function reads of the journal in use. Where a writer changed the ledger meanwhile, it is read
    again.

    Raises:
        LedgerError: there is no ledger, or it is damaged.
    """
    for _ in range(_TRIES):
        before = _moment(folder)
        try:
            journal = latest(folder)
            if journal is None:
                raise LedgerError(f"{folder} holds no ledger. Give the folder that was state_dir.")
            return parsed(journal.folder, partial(read, journal))
        except LedgerError:
            if _moment(folder) == before:
                raise
            time.sleep(_PAUSE_S)
    raise LedgerError(
        f"The ledger in {folder} changes faster than it can be read. Try again when its editor rests."
    )


def settled(folder: Path, look: Callable[[], T], is_fine: Callable[[T], bool]) -> T:
    """What a look at a ledger's files finds. Where it finds something amiss while a writer was at work, it is
    done again.
    """
    for _ in range(_TRIES):
        before, found = _moment(folder), None
        with contextlib.suppress(OSError):  # a file that a writer removed meanwhile
            found = look()
            if is_fine(found) or _moment(folder) == before:
                return found
        time.sleep(_PAUSE_S)
    return look()


def _moment(folder: Path) -> tuple[object, ...]:
    """Something that is different after each event."""
    try:
        found = newest(folder)
        return (None,) if found is None else (found.name, read_small(found / HEAD))
    except (LedgerError, OSError) as exc:
        return ("unreadable", str(exc))


def pointer_of(name: str) -> bytes:
    """Content of the pointer to a journal."""
    return canonical({"format": FORMAT, "journal": name})
