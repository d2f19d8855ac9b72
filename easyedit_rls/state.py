"""What an editor remembers of one model, how that memory follows the model's weights, and how it gets to disk."""

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor

from easyedit_rls.errors import LedgerError, StateMismatchError
from easyedit_rls.history import Entry, History, Solution, rebuild
from easyedit_rls.interrupts import deferred_interrupts
from easyedit_rls.ledger import Ledger
from easyedit_rls.ledger.journal import MANIFEST, Journal, Line
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.snapshot import lines_since_checkpoint, prior_files, read_prior, read_state, write_checkpoint
from easyedit_rls.model.weights import EditedWeight, weights_fingerprint
from easyedit_rls.priors import Prior

logger = logging.getLogger(__name__)


@dataclass
class EditorState:
    """Memory of all edits made to one model under one objective. It refers to no module, so a deep copy stands on its own.

    Attributes:
        layers: layer number -> its recursive solution; empty before the first batch.
        unedited: layer number -> W_0, (d_k, d_v), float32.
        templates: context templates of the keys and values.
        found: layer number -> the parameter as it was before the last change; None where that change can't be taken back.
        history: what was edited.
        ledger: the folder that this state is kept in, or None. A deep copy has none: it goes its own way.
        journal: the part of the ledger that this state is written to; None before the first batch.
        is_closed: whether the ledger was let go: nothing more can be edited.
    """

    layers: dict[int, Solution] = field(default_factory=dict)
    unedited: dict[int, Tensor] = field(default_factory=dict)
    templates: list[str] = field(default_factory=list)
    found: dict[int, Tensor] | None = None
    history: History = field(default_factory=History)
    ledger: Ledger | None = None
    journal: Journal | None = None
    is_closed: bool = False
    _beginning: dict[str, bytes] = field(default_factory=dict)  # files of a journal that is to begin with the first batch

    @property
    def n_edits(self) -> int:
        """Edits in the objective."""
        return next((solution.n_edits for solution in self.layers.values()), 0)

    @property
    def n_batches(self) -> int:
        """Batches taken in."""
        return self.history.n_batches

    def __deepcopy__(self, memo: dict[int, Any]) -> "EditorState":
        own = {name: copy.deepcopy(getattr(self, name), memo) for name in ("layers", "unedited", "templates", "found", "history")}
        return EditorState(**own)

    def begin(self, layers: dict[int, Solution], unedited: dict[int, Tensor], templates: list[str]) -> None:
        """Take the state before the first edit."""
        self.layers, self.unedited, self.templates = layers, unedited, templates

    def begin_ledger(self, manifest: Manifest, priors: Mapping[int, Prior]) -> None:
        """Before the first edit: make ready what a new journal begins with. Nothing is written before the first batch is."""
        self._beginning = {MANIFEST: manifest.encode(), **prior_files(priors)}

    def resume(self, journal: Journal, manifest: Manifest, devices: Mapping[int, torch.device]) -> None:
        """Take the state that a journal holds, bit for bit.

        Raises:
            LedgerError: a file of it is damaged.
        """
        snapshot = read_state(journal, devices)
        self.begin(snapshot.solutions, snapshot.unedited, list(manifest.templates))
        self.history, self.journal = snapshot.history, journal

    def forget(self) -> None:
        """Forget everything but the ledger's place, in memory alone."""
        self.begin({}, {}, [])
        self.found, self.history, self.journal, self._beginning = None, History(), None, {}

    def clear(self) -> None:
        """Forget everything but the ledger's place; what comes next begins a new journal there.

        Raises:
            LedgerError: the ledger can't be told.
        """
        self._check_open()
        if self.journal is not None:
            self.journal.append(Line("reset", {}, {}, _now()))
        self.forget()

    def follow(self, edited: Mapping[int, EditedWeight]) -> None:
        """Hold the state against the weights: go on, roll back as somebody did with the weights, or refuse.

        Args:
            edited: layer number -> the model's weight.

        Raises:
            StateMismatchError: the weights are neither those that the last change wrote nor those that it found.
            LedgerError: the ledger was closed, or the roll-back can't be written down.
        """
        self._check_open()
        changed = [layer for layer, solution in self.layers.items() if not edited[layer].holds(solution.weight)]
        if not changed:
            return
        if self.found is not None and all(torch.equal(edited[layer].parameter, found) for layer, found in self.found.items()):
            logger.info("The weights are those from before batch %d: it was rolled back, and so is the state", self.n_batches)
            self.roll_back()
            return
        raise StateMismatchError(
            f"The weights of layers {changed} are neither those that the last batch wrote nor those it found. Call reset() to start "
            "anew from them (in EasyEdit: reset_cache=True), or adopt_weights() to go on from them with the edits' covariance."
        )

    def _check_open(self) -> None:
        if self.is_closed:
            raise LedgerError("The editor was closed and has let its ledger go. Make a new one with the same state_dir.")

    def take_out(self, edit_ids: Iterable[int]) -> None:
        """Remove edits from the solution of every layer, as part of the change that was begun by `commit`."""
        wanted = list(edit_ids)
        gone = self.history.tensors(wanted, self.layers, next(iter(self.layers.values())).weight.device)
        for layer, solution in self.layers.items():
            K, V, D = (tensor.to(solution.weight.device) for tensor in gone[layer])
            solution.retract(K, V, D, joins_last=True)

    def commit(self) -> None:
        """From here on, the last change can't be rolled back any more; a new one begins."""
        self.found = None
        for solution in self.layers.values():
            solution.commit()

    def record(self, entry: Entry, data: Mapping[str, Tensor]) -> None:
        """Write a change down, on disk if there is a ledger.

        Args:
            entry: the change, made to the solutions already.
            data: its tensors.

        Raises:
            LedgerError: the disk is full, read only or failing; neither history nor ledger are changed.
        """
        if self.journal is not None:
            entry = self.journal.append_entry(entry, data)
        elif self.ledger is not None:
            self.journal = self.ledger.begin(self._beginning, entry, data)
            entry, self._beginning = self.journal.entries()[0], {}
        else:
            kept = {name: tensor.detach().cpu().clone() for name, tensor in data.items()}
            entry = replace(entry, data=lambda: kept)
        self.history.add(entry)

    def roll_back(self) -> None:
        """Take the last change out of the memory, bit for bit; the weights are somebody else's affair."""
        with deferred_interrupts():
            if self.journal is not None:
                self.journal.append(Line("rollback", {}, {}, _now()))
            for solution in self.layers.values():
                solution.rollback()
            self.found = None
            self.history.drop_last()

    def adopt(self, edited: Mapping[int, EditedWeight]) -> None:
        """Go on with the covariance of all edits so far, but from the weights as they are now."""
        self._check_open()
        weights = {layer: edited[layer].read() for layer in self.layers}
        entry = Entry("adopt", weights=fingerprint_of(edited))
        self.record(entry, {f"W.{layer}": W for layer, W in weights.items()})
        self.found = None
        for layer, solution in self.layers.items():
            solution.adopt(weights[layer])

    def rebuild(self, edited: Mapping[int, EditedWeight]) -> None:
        """Compute every covariance and weight anew from the ledger, in float64, and write the weights to the model."""
        if self.journal is None:
            return
        journal = self.journal
        self.commit()
        rebuilt = {
            layer: rebuild(read_prior(journal, layer, solution.weight.device).solution, solution, self.history, layer)
            for layer, solution in self.layers.items()
        }
        weights = weights_fingerprint({layer: s.weight.to(edited[layer].parameter.dtype) for layer, s in rebuilt.items()})
        self.record(Entry("rebuild", weights=weights), {})
        self.layers = rebuilt
        for layer, solution in rebuilt.items():
            edited[layer].write(solution.weight)

    def checkpoint(self, every: int) -> None:
        """Store the whole state again if as many events as `every` passed since the last time."""
        if self.journal is not None and lines_since_checkpoint(self.journal) >= every:
            write_checkpoint(self.journal, self.layers)

    def close(self) -> None:
        """Store the whole state, and let other editors have the ledger."""
        try:
            if not self.is_closed:
                self.checkpoint(1)
        finally:
            if self.ledger is not None:
                self.ledger.close()
                self.is_closed = True


def fingerprint_of(edited: Mapping[int, EditedWeight]) -> str:
    """`weights_fingerprint` of a model's edited weights."""
    return weights_fingerprint({layer: weight.oriented() for layer, weight in edited.items()})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
