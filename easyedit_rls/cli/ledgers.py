"""What commands on a ledger share."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from easyedit_rls._base.progress import progress_bar
from easyedit_rls.errors import LedgerError
from easyedit_rls.ledger.journal import Journal
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.reading import at_one_moment
from easyedit_rls.ledger.snapshot import read_moment

T = TypeVar("T")


def read_ledger(folder: Path, read: Callable[[Journal], T]) -> T:
    """What a function reads of the journal in use, all of one moment."""

    def look(journal: Journal) -> T:
        if journal.is_closed:
            raise LedgerError(
                f"All edits in {folder} were forgotten (reset) at {journal.lines[-1].time}. "
                "There is nothing to look at."
            )
        return read(journal)

    if not folder.is_dir():
        raise LedgerError(f"{folder} holds no ledger. Give the folder that was state_dir.")
    return at_one_moment(folder, look)


def moment_of(journal: Journal, from_start: bool = False) -> Moment:
    """The state, with a bar."""
    with progress_bar(len(journal.lines), "ledger", "event", None) as bar:
        return read_moment(journal, from_start=from_start, progress=bar)


def refuse_same_folder(out: Path, other: str, why: str) -> None:
    """See that a folder to write is not another one."""
    if out.exists() and Path(other).exists() and out.samefile(other):
        raise LedgerError(f"{out} is {other}: {why}. Give another folder to write to.")


def refuse_inside(out: Path, ledger: Path) -> None:
    """See that a folder to write is not within the ledger."""
    if ledger.resolve() in (out.resolve(), *out.resolve().parents):
        raise LedgerError(
            f"{out} lies within the ledger, where nothing else has a place. Give another folder to write to."
        )


def megabytes(n_bytes: int) -> str:
    """A size, for people."""
    return f"{n_bytes / 1e6:.1f} MB"
