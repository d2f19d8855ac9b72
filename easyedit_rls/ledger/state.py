"""What an editor remembers of one model, how that memory follows the model's weights, and how both get to
disk.

There is one way to make a change, whatever it is. The new moment is made beside the old one; the weights are
written; then the event is written down on disk, which is one rename; then the new moment takes the old one's
place, which is one assignment. What fails before that, and be it between the last two, is undone: the disk is
put back, and the weights are those of the old moment.
"""

import copy
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from easyedit_rls._base.interrupts import deferred_interrupts
from easyedit_rls.anchors.prior import LayerStart
from easyedit_rls.errors import LedgerError, NumericalError, StateMismatchError
from easyedit_rls.ledger import Ledger, Place
from easyedit_rls.ledger.change import Change, adopted
from easyedit_rls.ledger.history import Entry, History
from easyedit_rls.ledger.journal import MANIFEST, Event, Journal, entry_event, entry_of
from easyedit_rls.ledger.line import Line
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.shards import filled, shard_event
from easyedit_rls.ledger.snapshot import StoredBeginnings, prior_files, write_checkpoint
from easyedit_rls.model.cast import CastParameters
from easyedit_rls.model.weights import weights_fingerprint
from easyedit_rls.solvers.base import LayerSolver

logger = logging.getLogger(__name__)


class Memory(Protocol):
    """Where a model has its edits: what a state is held against, and puts back (`editors.transaction`)."""

    @property
    def dtypes(self) -> Mapping[int, torch.dtype]:
        """Layer -> the type that its weight is rounded to."""

    def holds(self, layer: int, W: Tensor) -> bool:
        """Whether a layer's weight is exactly W, (d_k, d_v), rounded to its type."""

    def read(self, layer: int) -> Tensor:
        """A layer's weight as a float32 copy, (d_k, d_v)."""

    def fingerprint(self) -> str:
        """`weights_fingerprint` of what is there."""

    def refuse_unknown(self) -> None:
        """See that it holds no edits that nobody knows of."""

    def begin(self, beginnings: Callable[[int], LayerStart]) -> None:
        """Take what it needs of the layers before the first edit."""

    def show(self, moment: Moment) -> None:
        """Let everything be as a moment says."""

    def restored_if_it_fails(self) -> AbstractContextManager[None]:
        """If the block fails, everything is bit for bit as it found it."""


class EditorState:
    """Memory of all edits made to one model under one objective. It refers to no module, so a deep copy
    stands on its own.

    Args:
        ledger: the folder that it is kept in, or None.
        place: where the ledger is.

    Attributes:
        now: all that is remembered.
        ledger: see above. A deep copy has none: it goes its own way.
        history_found: what was edited before this state was made or resumed.
        is_closed: whether the ledger was let go: nothing more can be edited.
        casts: of the model's parameters in another type, for the values; freed with the state, and by
            `close`.
        mutex: held by whoever works with the state or the weights; others wait.
    """

    def __init__(self, ledger: Ledger | None = None, place: Place | None = None) -> None:
        self.now = Moment(place=place or Place())
        self.ledger = ledger
        self.history_found = self.now.history
        self.is_closed = False
        self.casts = CastParameters()
        self.mutex = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "EditorState":
        other = EditorState()
        with self.mutex:
            other.now = copy.deepcopy(self.now, memo)
        return other

    @property
    def layers(self) -> Mapping[int, LayerSolver]:
        """Layer number -> its running solution; empty before the first batch."""
        return self.now.solutions

    @property
    def history(self) -> History:
        """What was edited."""
        return self.now.history

    @property
    def unedited(self) -> Mapping[int, Tensor]:
        """Layer number -> W_0, (d_k, d_v), float32."""
        return self.now.unedited

    @property
    def templates(self) -> tuple[str, ...]:
        """Context templates of the keys and values."""
        return self.now.templates

    @property
    def n_edits(self) -> int:
        """Edits in the objective."""
        return len(self.now.history.live)

    @property
    def n_batches(self) -> int:
        """Batches taken in."""
        return self.now.history.n_batches

    @property
    def has_changed(self) -> bool:
        """Whether a change was made, or taken back, since the state was made or resumed."""
        return self.now.history is not self.history_found

    @property
    def is_recorded(self) -> bool:
        """Whether there is a journal that the next change goes to."""
        return (
            self.ledger is not None
            and bool(self.layers)
            and self.now.unbegun is None
            and self.now.place.is_recorded
        )

    def begin(
        self, priors: Mapping[int, LayerStart], templates: list[str], manifest: Manifest | None
    ) -> None:
        """Take the state before the first edit. Nothing is written before the first batch is.

        Args:
            priors: layer -> its prior.
            templates: context templates of the keys and values.
            manifest: what a new journal says of itself; None without a ledger.
        """
        self.now = replace(
            self.now,
            solutions={layer: prior.solution for layer, prior in priors.items()},
            unedited={layer: prior.unedited for layer, prior in priors.items()},
            beginnings={layer: prior.beginning for layer, prior in priors.items()},
            templates=tuple(templates),
            unbegun=None if manifest is None else {MANIFEST: manifest.encode(), **prior_files(priors)},
        )

    def sync_with_weights(self, memory: Memory) -> None:
        """Hold the state against the weights: go on, roll back as somebody did with the weights, or refuse.

        Args:
            memory: the model's.

        Raises:
            StateMismatchError: the weights are neither those that the last change wrote nor those that it
                found.
            LedgerError: the ledger was closed, or the roll-back can't be written down.
        """
        self._check_open()
        changed = [layer for layer in self.layers if not memory.holds(layer, self.now.weight(layer))]
        if not changed:
            return
        before = self.now.before
        if before is not None and any(
            all(memory.holds(layer, W) for layer, W in weights.items()) for weights in before.found_weights()
        ):
            logger.info(
                "The weights are those from before batch %d: it was rolled back, and so is the state",
                self.n_batches,
            )
            self.roll_back(None)
            memory.show(self.now)  # a gate follows
            return
        raise StateMismatchError(
            f"The weights of layers {changed} are neither those "
            "that the last batch wrote nor those it found. Call reset() to start "
            "anew from them (in EasyEdit: reset_cache=True), or adopt_weights() "
            "to go on from them with the edits' covariance."
        )

    @contextmanager
    def change(self, memory: Memory, kind: str = "edit") -> Iterator[Change]:
        """All or nothing: what happens to the change inside, and to the weights, is written down as one, or
        is undone if anything fails.

        Args:
            memory: the model's; the block writes the change's solutions there.
            kind: see `Entry`.
        """
        with self._all_or_nothing(memory):
            change = Change(self.now, kind)
            yield change
            weights = memory.fingerprint()
            if weights != _fingerprint(change, memory.dtypes):
                raise NumericalError(
                    "The model's weights do not hold what was written. "
                    "Something computes them anew: remove its hooks."
                )
            self._take(change, weights)

    def retract(self, edit_ids: Sequence[int], dtype: torch.dtype) -> None:
        """Take edits out of the memory alone; a model in that dtype gets the new weights when it comes back
        to the ledger.

        Raises:
            RequestError: one of them names no edit that stands.
            LedgerError: it can't be written down; nothing was changed.
        """
        with self._all_or_nothing(None):
            change = Change(self.now, "retract")
            change.open(self.history.check(edit_ids))
            self._take(change, _fingerprint(change, dict.fromkeys(self.layers, dtype)))

    def roll_back(self, memory: Memory | None) -> None:
        """Take the last change back, bit for bit.

        Args:
            memory: the model's, to be put back too; None where somebody did that.

        Raises:
            StateMismatchError: there is no change to take back.
            LedgerError: it can't be written down; nothing was changed.
        """
        before = self.now.before
        if before is None:
            raise StateMismatchError("No batch can be rolled back: only the last one can, and only once.")
        with self._all_or_nothing(memory):
            if memory is not None:
                memory.show(before)
            now = self.now.rolled_back(self._note(Line("rollback")))
            self.now = now

    def adopt(self, memory: Memory) -> None:
        """Go on with the covariance of all edits so far, but from the weights as they are now."""
        self._check_open()
        with self._all_or_nothing(None):
            weights = {layer: self._weight_now(layer, memory) for layer in self.layers}
            self._take(adopted(self.now, weights), memory.fingerprint())

    def reset(self) -> None:
        """Forget everything but the ledger's place; what comes next begins a new journal there.

        Raises:
            LedgerError: the ledger can't be told.
        """
        self._check_open()
        with self._all_or_nothing(None):
            now = Moment(place=self._note(Line("reset")))
            self.now = now

    def begin_shard(self, memory: Memory) -> None:
        """Let edits go to a new shard from now on; what was edited so far stays.

        Args:
            memory: the model's.

        Raises:
            LedgerError: it can't be written down; nothing was changed.
        """
        with self._all_or_nothing(memory):
            change = Change(self.now)
            change.open()  # what has drifted is mended first
            shard, place = filled(change.solutions), self.now.place
            with deferred_interrupts():
                if self.ledger is not None and self.is_recorded:
                    place, _ = self.ledger.record(place, shard_event(shard, place.position.n_lines))
                now = self.now.with_shard(shard, place)
                memory.show(now)
            self.now = now

    def checkpoint(self, every: int) -> None:
        """Store the whole state again if as many events as `every` passed since the last time, or a layer was
        summed anew.
        """
        if self.ledger is None or not self.is_recorded:
            return
        since = self.now.place.position.since_checkpoint
        if since >= every or (since and self.history.entries and self.history.entries[-1].rebuilt):
            with self._all_or_nothing(None):
                now = write_checkpoint(self.ledger, self.now)
                self.now = now

    def close(self) -> None:
        """Store the whole state, and let other editors have the ledger."""
        try:
            if not self.is_closed:
                self.checkpoint(1)
                if self.ledger is not None:
                    self.ledger.settle(self.now.place)
        finally:
            self.casts.clear()
            if self.ledger is not None:
                self.ledger.close()
                self.is_closed = True

    def _weight_now(self, layer: int, memory: Memory) -> Tensor:
        """What a weight is, (d_k, d_v): the master where the model holds that one rounded, else what it
        holds.
        """
        master = self.now.weight(layer)
        return master if memory.holds(layer, master) else memory.read(layer)

    def _check_open(self) -> None:
        if self.is_closed:
            raise LedgerError(
                "The editor was closed and has let its ledger go. Make a new one with the same state_dir."
            )

    @contextmanager
    def _all_or_nothing(self, memory: Memory | None) -> Iterator[None]:
        """If the block fails before the new moment is in place, disk and weights are as the old one says."""
        start = self.now
        try:
            yield
        except BaseException:
            if (
                self.now.solutions is start.solutions and self.now.history is start.history
            ):  # a checkpoint changes the place alone
                with deferred_interrupts():
                    if self.ledger is not None:
                        self.ledger.put_back(self.now.place)
                    if memory is not None:
                        memory.show(start)
            raise

    def _take(self, change: Change, weights: str) -> None:
        """Write a change down, and let its moment be the present one."""
        entry = change.entry(weights)
        with deferred_interrupts():
            begun, place, entry = self._write_down(entry, change.data)
            history = begun.history.plus(entry)
            now = begun.changed(change.solutions, change.shards, history, place, is_final=entry.is_final)
        self.now = now  # an interrupt that was held back comes before: the change is undone

    def _write_down(self, entry: Entry, data: Mapping[str, Tensor]) -> tuple[Moment, Place, Entry]:
        """Write a change down, on disk if there is a ledger; returns the moment before it, the place after
        it, and the entry.
        """
        now = self.now
        if self.ledger is None:
            kept = {name: tensor.detach().cpu().clone() for name, tensor in data.items()}
            return now, now.place, replace(entry, data=lambda: kept)
        event = entry_event(entry, data)
        if now.unbegun is None:
            place, line = self.ledger.record(now.place, event)
        else:
            place, line = self.ledger.begin(now.place, now.unbegun, {}, [[event]])
            assert place.folder is not None
            now = replace(
                now, unbegun=None, beginnings=StoredBeginnings(Journal(place.folder), now.solutions)
            )
        assert place.folder is not None
        return now, place, entry_of(place.folder, line)

    def _note(self, line: Line) -> Place:
        """Write an event down that brings nothing."""
        if self.ledger is None or not self.is_recorded:
            return self.now.place
        with deferred_interrupts():
            return self.ledger.record(self.now.place, Event(line))[0]


def _fingerprint(change: Change, dtypes: Mapping[int, torch.dtype]) -> str:
    return weights_fingerprint(
        {layer: change.solutions[layer].weight.to(dtype) for layer, dtype in dtypes.items()}
    )
