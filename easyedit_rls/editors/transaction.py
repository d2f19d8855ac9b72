"""The one place that writes edited weights: a batch puts them there layer by layer, and what fails takes them
back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from easyedit_rls.anchors.prior import LayerStart
from easyedit_rls.ledger.history import GateEntry
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.shards import Shard
from easyedit_rls.model.weights import EditedWeight, weights_fingerprint
from easyedit_rls.solvers.base import LayerSolver


class WeightMemory:
    """Edits stand in the model's own weights. What a state writes to, and is held against (`ledger.state`).

    Args:
        edited: layer number -> the model's weight.

    Attributes:
        gate: what a gate goes by; weights have none.
        leverage: of each of the last batch's keys, and whether it is open; weights have none.
    """

    gate: GateEntry | None = None
    leverage: list[tuple[float, bool]] | None = None

    def __init__(self, edited: Mapping[int, EditedWeight]) -> None:
        self._edited = edited

    @property
    def dtypes(self) -> dict[int, torch.dtype]:
        """Layer -> the type that its weight is rounded to."""
        return {layer: weight.parameter.dtype for layer, weight in self._edited.items()}

    def begin(self, beginnings: Callable[[int], LayerStart]) -> None:
        """Weights need nothing of the layers before the first edit."""

    def holds(self, layer: int, W: Tensor) -> bool:
        """Whether a layer's weight is exactly W, (d_k, d_v), rounded to its type."""
        return self._edited[layer].holds(W)

    def read(self, layer: int) -> Tensor:
        """A layer's weight as a float32 copy, (d_k, d_v)."""
        return self._edited[layer].read()

    def fingerprint(self) -> str:
        """`weights_fingerprint` of what is there."""
        return weights_fingerprint({layer: weight.oriented() for layer, weight in self._edited.items()})

    def refuse_unknown(self) -> None:
        """Whatever the weights are, they count as unedited before the first edit."""

    def reset(self) -> None:
        """Weights stay as they are."""

    def write(self, layer: int, solution: LayerSolver, keys: Tensor | None = None) -> None:
        """Let a layer's weight be its solution's, rounded to its type; `keys` are the batch's."""
        self._edited[layer].write(solution.weight)

    def hold_full(self, shards: Sequence[Shard]) -> None:
        """Weights have no shards."""

    def show(self, moment: Moment) -> None:
        """Let all weights be those of a moment."""
        for layer in moment.solutions:
            self._edited[layer].write(moment.weight(layer))

    @contextmanager
    def restored_if_it_fails(self) -> Iterator[None]:
        """If the block fails, the weights are bit for bit as it found them."""
        found = {layer: weight.snapshot() for layer, weight in self._edited.items()}
        try:
            yield
        except BaseException:
            for layer, snapshot in found.items():
                self._edited[layer].restore(snapshot)
            raise
