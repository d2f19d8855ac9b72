"""A ledger without what no longer counts: edits that were taken back, roll-backs, old checkpoints, old journals."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from easyedit_rls.errors import LedgerError
from easyedit_rls.files import PARTIAL
from easyedit_rls.history import Edit, Entry, History
from easyedit_rls.ledger.journal import MANIFEST, Journal
from easyedit_rls.ledger.ledger import Ledger, journals
from easyedit_rls.ledger.snapshot import Snapshot, prior_files, read_prior, write_checkpoint


def compact(ledger: Ledger, journal: Journal, snapshot: Snapshot) -> Journal:
    """Write the journal anew, then remove the older ones. The state stays bit for bit the same: it is checkpointed.

    Args:
        ledger: held by the caller.
        journal: the one in use.
        snapshot: its state.

    Returns:
        The new journal.

    Raises:
        LedgerError: the disk is full, read only or failing; the old journals are then still there.
    """
    old = journals(ledger.folder)
    layers = list(snapshot.solutions)
    files = {MANIFEST: journal.read(MANIFEST), **prior_files({layer: read_prior(journal, layer) for layer in layers})}
    partial = ledger.reserve()
    try:
        fresh = Journal.create(partial, files, snapshot.history.next_id)
        for entry, data in _standing(snapshot.history, layers):
            fresh.append_entry(entry, data)
        write_checkpoint(fresh, snapshot.solutions)
        new = ledger.publish(partial)
        for folder in old:  # under a name that is cleared away, so that no half journal can be met
            gone = folder.with_name(folder.name + PARTIAL)
            folder.rename(gone)
            shutil.rmtree(gone)
    except BaseException as exc:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(exc, OSError) and not isinstance(exc, LedgerError):
            raise LedgerError(f"The ledger in {ledger.folder} can't be written: {exc.strerror or exc}. Make room, then try again.") from exc
        raise
    return new


def _standing(history: History, layers: list[int]) -> Iterator[tuple[Entry, Mapping[str, Tensor]]]:
    """The entries with the edits that stand, and their tensors. Adopted weights depend on all that came before: then nothing goes."""
    if any(entry.kind == "adopt" for entry in history.entries):
        yield from ((entry, entry.data()) for entry in history.entries)
        return
    for entry in history.entries:
        kept = [edit for edit in entry.edits if edit.edit_id in history.live]
        if not kept and all(factor == 1.0 for factor in entry.factors.values()):
            continue
        data = entry.data()
        rows = [edit.row for edit in kept]
        edits = tuple(Edit(edit.edit_id, edit.request, row) for row, edit in enumerate(kept))
        names = ["importance", *(f"{kind}.{layer}" for layer in layers for kind in "KV")]
        yield replace(entry, edits=edits, removed=()), {name: data[name][rows] for name in names}
