"""All that is remembered of one model's edits, at one moment. It is a value: a change makes a new moment, the
old one stays.
"""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from easyedit_rls.ledger.history import History
from easyedit_rls.ledger.ledger import Place
from easyedit_rls.ledger.shards import Shard, fresh
from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.batch import Beginning


@dataclass(frozen=True)
class Moment:
    """What an editor remembers.

    Attributes:
        solutions: layer -> its running solution; empty before the first batch.
        unedited: layer -> W_0, (d_k, d_v), float32.
        beginnings: layer -> what a rebuild begins with.
        templates: context templates of the keys and values.
        history: what was edited.
        before: the moment before the last change, which a roll-back goes to; None where that change can't be
            taken back.
        shards: of a gated memory that were full, in order; `solutions` are the newest's.
        place: in the ledger, if there is one.
        unbegun: files of a journal that is to begin with the first change; None where it has begun, or there
            is no ledger.
    """

    solutions: Mapping[int, LayerSolver] = field(default_factory=dict)
    unedited: Mapping[int, Tensor] = field(default_factory=dict)
    beginnings: Mapping[int, Beginning] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    history: History = field(default_factory=History)
    before: "Moment | None" = None
    shards: tuple[Shard, ...] = ()
    place: Place = field(default_factory=Place)
    unbegun: Mapping[str, bytes] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "Moment":
        """A moment that stands on its own: what it needs of the ledger is in memory."""
        before = None if self.before is None else copy.deepcopy(replace(self.before, place=Place()), memo)
        history = self.history
        if self.place.folder is not None:
            loaded = {id(entry): entry.loaded() for entry in history.entries}
            history = history.with_entries(loaded)
            before = None if before is None else replace(before, history=before.history.with_entries(loaded))
        own, beginnings = copy.deepcopy(dict(self.solutions), memo), dict(self.beginnings)
        return replace(
            self,
            solutions=own,
            history=history,
            before=before,
            beginnings=beginnings,
            place=Place(),
            unbegun=None,
        )

    @property
    def device(self) -> torch.device:
        """Where the solutions live."""
        return next(iter(self.solutions.values())).weight.device

    def weight(self, layer: int) -> Tensor:
        """What the model's weight is at this moment, (d_k, d_v). Anchors with values of their own count from
        the first edit on.
        """
        return (
            self.solutions[layer].weight
            if self.history.entries or self.history.n_batches
            else self.unedited[layer]
        )

    def merged(self, layer: int) -> Tensor:
        """W_0 with the edits of all shards at once, (d_k, d_v), float64."""
        W_0 = self.unedited[layer].double()
        full = (shard.weights[layer].double() - W_0 for shard in self.shards)
        return sum(full, start=self.weight(layer).double())

    def changed(
        self,
        solutions: Mapping[int, LayerSolver],
        shards: tuple[Shard, ...],
        history: History,
        place: Place,
        *,
        is_final: bool = False,
    ) -> "Moment":
        """The moment after a change; one that is final can't be rolled back."""
        before = None if is_final else replace(self, before=None)
        return replace(self, solutions=solutions, shards=shards, history=history, place=place, before=before)

    def with_shard(self, shard: Shard, place: Place) -> "Moment":
        """The moment where the running solutions have become a shard, and a new one begins. The last change
        can still be rolled back.
        """
        begun = fresh(self.solutions, self.beginnings, self.unedited)
        return replace(self, solutions=begun, shards=(*self.shards, shard), place=place)

    def found_weights(self) -> Iterator[Mapping[int, Tensor]]:
        """What a change made to this moment found in the model, layer -> (d_k, d_v): its weights, or where it
        was to begin a shard those of the one before.
        """
        yield {layer: self.weight(layer) for layer in self.solutions}
        if self.shards and all(solution.n_edits == 0 for solution in self.solutions.values()):
            yield self.shards[-1].weights

    def rolled_back(self, place: Place) -> "Moment":
        """The moment before the last change once more; the numbers of its edits stay used."""
        assert self.before is not None
        return replace(self.before, history=self.before.history.using(self.history.next_id), place=place)
