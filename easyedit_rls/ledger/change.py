"""One change of the solutions on its way: what is taken out, what comes in,
and where float32 can't follow.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError, PrecisionError
from easyedit_rls.ledger.history import Edit, Entry, GateEntry
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.rebuild import rebuilt
from easyedit_rls.ledger.shards import without
from easyedit_rls.solvers.base import LayerSolver

logger = logging.getLogger(__name__)

DRIFT_TOLERANCE = 1e-2  # of the covariance, relative
WEIGHT_TOLERANCE = 5e-4  # of the edit


@dataclass
class Change:
    """What a change does, on top of a moment that it leaves as it is.

    Attributes:
        start: the moment before it.
        solutions: layer -> the solution as far as the change has come.
        shards: the full ones, as far as the change has come.
        kind: see `Entry`.
        edits: facts edited in.
        removed: numbers of edits taken out.
        rebuilt: layers that were summed anew.
        factors: layer -> forgetting factor.
        data: tensors of what came in, see `Entry.data`.
        gate: what a gated memory goes by after it; the one before stays unless somebody sets another.
    """

    start: Moment
    kind: str = "edit"
    edits: tuple[Edit, ...] = ()
    removed: tuple[int, ...] = ()
    rebuilt: list[int] = field(default_factory=list)
    factors: dict[int, float] = field(default_factory=dict)
    data: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gate: GateEntry | None = self.start.history.gate
        self.solutions: dict[int, LayerSolver] = dict(self.start.solutions)
        self.shards = self.start.shards
        self._gone: list[int] = []  # from the newest shard

    def open(self, removed: Sequence[int] = ()) -> None:
        """Take edits out, and sum anew what has drifted. To be called once, first of all.

        Args:
            removed: numbers of edits that stand.

        Raises:
            NumericalError: what is left is not positive definite.
        """
        self.removed = tuple(removed)
        history = self.start.history
        by_shard = history.by_shard(removed)
        self._gone = by_shard.pop(len(self.shards), [])
        if by_shard:
            rest = history.plus(Entry("retract", removed=self.removed))
            self.shards = without(self.shards, by_shard, self.start.beginnings, rest)
        for layer, solution in self.solutions.items():
            if solution.can_drift and (
                solution.drift() > DRIFT_TOLERANCE or solution.weight_error() > WEIGHT_TOLERANCE
            ):
                logger.warning(
                    "Layer %d has drifted (covariance %.1e, weight %.1e): "
                    "it is summed anew in float64, and stays in it",
                    layer,
                    solution.drift(),
                    solution.weight_error(),
                )
                self._rebuild(layer)
        by_step = [layer for layer in self.solutions if layer not in self.rebuilt]
        gone = history.tensors(self._gone, by_step, self.start.device) if self._gone and by_step else {}
        for layer, (K, V, D) in gone.items():
            try:
                self.solutions[layer] = self.solutions[layer].retract(K, V, D)
            except PrecisionError as exc:
                logger.info("%s", exc)
                self._rebuild(layer)

    def bring_in(self, layer: int, K: Tensor, V: Tensor, importance: Tensor) -> None:
        """Edit facts into one layer: keys (u, d_k), target outputs (u, d_v), importances (u,), or all with a
        row dimension more.

        Raises:
            NumericalError: the update can't be made, in float64 either.
        """
        solution = self.solutions[layer]
        try:
            solution = solution.update(K, V, importance, same_change=self._is_begun(layer))
        except PrecisionError as exc:
            if layer in self.rebuilt or not solution.can_drift:
                raise
            logger.info("%s", exc)
            self._rebuild(layer)
            solution = self.solutions[layer].update(K, V, importance, same_change=True)
        self.solutions[layer], self.factors[layer] = solution, solution.gamma
        self.data |= {f"K.{layer}": K, f"V.{layer}": V, "importance": importance}

    def look_after(self, layer: int, K: Tensor, importance: Tensor) -> None:
        """Show a rule the batch's keys once more, as they are when all layers are written: (u, d_k), or with
        a row dimension more.
        """
        self.solutions[layer] = self.solutions[layer].after_batch(K, importance)
        self.data[f"K_after.{layer}"] = K

    def entry(self, weights: str) -> Entry:
        """What is to be written down."""
        return Entry(
            self.kind,
            self.edits,
            self.removed,
            tuple(self.rebuilt),
            self.factors,
            weights,
            self.gate,
            len(self.shards),
        )

    def _is_begun(self, layer: int) -> bool:
        return bool(self._gone) or layer in self.rebuilt

    def _rebuild(self, layer: int) -> None:
        start = self.start
        self.solutions[layer] = rebuilt(
            start.beginnings[layer],
            start.solutions[layer],
            start.history,
            layer,
            self._gone,
            len(self.shards),
        )
        self.rebuilt.append(layer)


def adopted(moment: Moment, weights: Mapping[int, Tensor]) -> Change:
    """The change to weights that somebody else wrote, layer -> (d_k, d_v).

    Raises:
        NumericalError: one of them is not finite.
    """
    for layer, W in weights.items():
        if not bool(torch.isfinite(W).all()):
            raise NumericalError(
                f"The weight of layer {layer} holds NaN or infinite entries. "
                "Put a sound one there, then adopt it."
            )
    change = Change(moment, "adopt", data={f"W.{layer}": W for layer, W in weights.items()})
    change.solutions = {layer: solution.adopt(weights[layer]) for layer, solution in moment.solutions.items()}
    return change
