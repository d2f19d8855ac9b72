"""What an interrupted writer, a backup that was put back, or somebody else left in a ledger: found, and set
aside before the first event.

Nothing that this package did not write is ever deleted. What lies behind the last event that counts may be a
torn write, but also the newer half of a ledger whose index was put back from a backup; so it is kept too.
"""

import logging
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path

from easyedit_rls._base.files import PARTIAL, make_folder, sync_folder, write_file
from easyedit_rls.errors import LedgerError
from easyedit_rls.ledger.files import is_file_name, journal_number, open_regular
from easyedit_rls.ledger.journal import ENTRIES, HEAD, INDEX, SPARE, Journal, tail_of

logger = logging.getLogger(__name__)

SET_ASIDE = "set-aside"


def leftovers(folder: Path, in_use: Path | None) -> list[Path]:
    """What has no place in a ledger: unknown names in the journal in use, and journals that never came into
    use.

    Args:
        folder: of the ledger.
        in_use: folder of its journal in use.
    """
    newest = -1 if in_use is None else journal_number(in_use.name) or 0
    found = [
        path for path in folder.iterdir() if (journal_number(path.name.removesuffix(PARTIAL)) or -1) > newest
    ]
    found += [path for path in folder.glob(f"journal-*{PARTIAL}") if path not in found]
    if in_use is not None:
        known = Journal(in_use).known_names()
        found += [path for path in in_use.iterdir() if path.name not in known]
    return sorted(found)


def tails(in_use: Path) -> list[tuple[Path, int]]:
    """Files of a journal that go on behind the last event, with the bytes up to there."""
    position = Journal(in_use).position
    ends = [(in_use / INDEX, position.n_index), (in_use / ENTRIES, position.n_data)]
    return [(path, n_bytes) for path, n_bytes in ends if tail_of(path, n_bytes)]


def tidy(folder: Path, in_use: Path | None) -> None:
    """Set aside what has no place in the ledger. Only for the holder of the lock.

    Raises:
        OSError: it can't be moved.
    """
    if (folder / SET_ASIDE).is_symlink():
        raise LedgerError(
            f"{folder / SET_ASIDE} is a link. What is set aside must stay in the ledger: put a folder there."
        )
    aside = folder / SET_ASIDE / datetime.now(timezone.utc).strftime("%Y-%m-%dT%H-%M-%S-%f")
    moved = []
    for path in leftovers(folder, in_use):
        if _is_torn(path):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            make_folder(aside)
            os.rename(path, aside / path.name)
            moved.append(path)
    for path, n_bytes in tails(in_use) if in_use is not None else ():
        make_folder(aside)
        with open(open_regular(path), "rb") as whole:
            whole.seek(n_bytes)
            write_file(aside / f"{path.name}-from-{n_bytes}", whole.read())
        moved.append(path)
    if moved:
        sync_folder(aside)
        logger.warning(
            "Found in the ledger what has no place there (%s): set aside in %s",
            ", ".join(map(str, moved)),
            aside,
        )


def _is_torn(path: Path) -> bool:
    """Whether this package was writing or removing it when it was interrupted."""
    name = path.name.removesuffix(PARTIAL)
    if path.is_symlink() or name == path.name:
        return False
    if path.is_dir():
        return journal_number(name) is not None
    return path.is_file() and (is_file_name(name) or name in (INDEX, ENTRIES, HEAD, SPARE))
