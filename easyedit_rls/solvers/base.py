"""What both kinds of running solution have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError
from easyedit_rls.solvers.spd import row_major
from easyedit_rls.solvers.watch import WeightWatch

S = TypeVar("S", bound="LayerSolver")


class Parts(Protocol):
    """What every solution consists of, whatever else."""

    @property
    def W(self) -> Tensor: ...

    @property
    def n_edits(self) -> int: ...


class LayerSolver(ABC):
    """The solution of one edited layer's regularized least-squares problem, as a value: a change makes a new
    one.

    It stays good until the change after the next; older ones may give up their memory.

    Attributes:
        name: of the layer, for messages.
        gamma: forgetting factor of the batch that made it; 1 where nothing fades.
        can_drift: whether rounding piles up in it from batch to batch.
    """

    name: str
    _parts: Parts
    gamma: float = 1.0
    can_drift: ClassVar[bool] = True

    @property
    def watch(self) -> WeightWatch | None:
        """Of the weight, where one is kept."""
        return None

    @property
    def weight(self) -> Tensor:
        """W_t, (d_k, d_v). Do not write to it; it is good until the change after the next."""
        return self._parts.W

    @property
    def n_edits(self) -> int:
        """Edits taken in and not retracted, faded ones too."""
        return self._parts.n_edits

    @abstractmethod
    def covariance(self) -> Tensor:
        """C_t as a new (d_k, d_k) tensor."""

    @abstractmethod
    def update(
        self: S,
        K: Tensor,
        V: Tensor,
        importance: Tensor | None = None,
        *,
        same_change: bool = False,
        factor: float | None = None,
    ) -> S:
        """The solution with one batch of edits more."""

    @abstractmethod
    def retract(
        self: S, K: Tensor, V: Tensor, importance: Tensor | None = None, *, same_change: bool = False
    ) -> S:
        """The solution without some edits, as if they had never been made."""

    @abstractmethod
    def adopt(self: S, W: Tensor) -> S:
        """The same covariance with a weight that somebody else wrote, (d_k, d_v)."""

    @abstractmethod
    def drift(self) -> float:
        """Relative error of what the covariance is, seen through fixed random probes."""

    @abstractmethod
    def weight_error(self) -> float:
        """What the weight lacks of the least-squares solution, as a share of the edit."""

    @abstractmethod
    def tensors(self, before: "LayerSolver | None" = None) -> dict[str, Tensor]:
        """The solution as tensors for a file, with the one before it."""

    def _checked(
        self, K: Tensor, V: Tensor, importance: Tensor | None, like: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs in one dtype and memory layout, a row each key."""
        D = torch.ones(K.shape[:-1]) if importance is None else importance
        d_k, d_v = self.weight.shape
        has_widths = (K.shape[-1:], V.shape[-1:]) == ((d_k,), (d_v,))
        if not has_widths or not K.shape[:-1] == V.shape[:-1] == D.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (K, V, D))
            raise NumericalError(
                f"Keys, target outputs and importances of {self.name} have the shapes {shapes}; "
                f"its weight is {d_k} x {d_v}. Give a row each edit, of these widths."
            )
        K, V, D = flat_rows(K, V, D)
        K, V, D = row_major(K, like), row_major(V, like), D.to(like)
        for label, tensor in (("Keys", K), ("Target outputs", V), ("Importances", D)):
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(
                    f"{label} of {self.name} hold NaN or infinite entries. Check the model's weights for NaN."
                )
        return K, V, D


def flat_rows(K: Tensor, V: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, target outputs and importances as (rows, d_k), (rows, d_v), (rows,), however many rows an edit
    has.
    """
    return K.flatten(0, -2), V.flatten(0, -2), D.flatten()


def part_of(stored: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
