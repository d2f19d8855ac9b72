"""A ledger without what no longer counts: edits that were taken back, roll-backs, old checkpoints, old
journals.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from easyedit_rls.ledger.history import Entry
from easyedit_rls.ledger.journal import MANIFEST, Event, Journal, entry_event
from easyedit_rls.ledger.ledger import Ledger
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.shards import shard_event
from easyedit_rls.ledger.snapshot import checkpoint_event, prior_files, read_prior

_AT_ONCE = 1 << 26  # bytes that are written in one go


def compact(ledger: Ledger, journal: Journal, moment: Moment) -> Moment:
    """Write the journal anew, then remove the older ones. The state stays bit for bit the same: it is
    checkpointed.

    The last change stays as it is, so that it can be rolled back.

    Args:
        ledger: held by the caller.
        journal: the one in use.
        moment: its state.

    Returns:
        The same moment in the new journal.

    Raises:
        LedgerError: the disk is full, read only or failing; the old journals are then still there.
    """
    files = {
        MANIFEST: journal.read(MANIFEST),
        **prior_files({layer: read_prior(journal, layer) for layer in moment.solutions}),
    }
    kept = list(_standing(moment))
    if kept:
        kept[-1] = replace(kept[-1][0], gate=moment.history.gate), kept[-1][1]
    known = {entry.weights for entry, _ in kept}
    dropped = [entry.weights for entry in moment.history.entries if entry.weights not in known]
    beginning = {
        "next_id": moment.history.next_id,
        "n_batches": moment.history.n_batches - sum(entry.kind == "edit" for entry, _ in kept),
        "fingerprints": list(dict.fromkeys([*moment.history.fingerprints, *dropped])),
    }
    place, _ = ledger.begin(moment.place, files, beginning, _parts(kept, moment))
    assert place.folder is not None
    ledger.remove(keep=place.folder)
    return replace(moment, place=place)


def _standing(moment: Moment) -> Iterator[tuple[Entry, list[int] | None]]:
    """The entries with the edits that stand, and their rows in the tensors; the last change whole. Adopted
    weights depend on all that came
    before: then nothing goes.
    """
    history = moment.history if moment.before is None else moment.before.history
    rebuilt: set[int] = set()  # layers that are in float64 from the next entry of this shard on
    number = 0
    for entry in history.entries:
        rebuilt, number = rebuilt if entry.shard == number else set(), entry.shard
        rebuilt |= set(moment.solutions if entry.kind == "rebuild" else entry.rebuilt)
        kept = [edit for edit in entry.edits if edit.edit_id in history.live]
        fades = any(factor != 1.0 for factor in entry.factors.values())
        if history.is_adopted:
            yield entry, None
        elif kept or fades:
            edits = tuple(replace(edit, row=row) for row, edit in enumerate(kept))
            yield (
                replace(entry, edits=edits, removed=(), rebuilt=tuple(sorted(rebuilt))),
                [edit.row for edit in kept],
            )
            rebuilt = set()
    if moment.before is not None:
        last = moment.history.entries[-1]
        yield replace(last, rebuilt=tuple(sorted({*rebuilt, *last.rebuilt}))), None


def _parts(kept: Sequence[tuple[Entry, list[int] | None]], moment: Moment) -> Iterator[list[Event]]:
    """All events of the new journal, some at a time."""
    shards = (moment.before or moment).shards  # as they were before the last change
    events: list[Event] = []
    n_lines, n_full = 1, 0
    for entry, rows in kept:
        for number in range(n_full, entry.shard):
            events.append(shard_event(shards[number], n_lines))
            n_lines += 1
        n_full, n_lines = entry.shard, n_lines + 1
        data = entry.data()
        events.append(
            entry_event(
                entry, data if rows is None else {name: tensor[rows] for name, tensor in data.items()}
            )
        )
        if sum(len(event.data or b"") for event in events) > _AT_ONCE:
            yield events
            events = []
    for number in range(n_full, len(shards)):
        events.append(shard_event(shards[number], n_lines))
        n_lines += 1
    yield [*events, checkpoint_event(moment, n_lines)]
