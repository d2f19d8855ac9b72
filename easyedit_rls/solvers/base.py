"""What an update rule is: from keys, target outputs and importances to a new weight.

Letters as in `solvers.rls`; rows are edits. A solver is the running state of one layer under one rule, and a
value: a change makes a new one, and the one before stays what it was. To commit is to keep the new one, to
roll back is to keep the old one.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from easyedit_rls.errors import HyperParamsError, NumericalError
from easyedit_rls.registry import Registry
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import row_major
from easyedit_rls.solvers.watch import WeightWatch

S = TypeVar("S", bound="LayerSolver")

SOLVERS: "Registry[type[LayerSolver]]" = Registry("solver", "easyedit_rls.solvers", ("easyedit_rls.solvers",))
register_solver = SOLVERS.register


@dataclass(frozen=True)
class NoSettings:
    """A rule without settings of its own."""


class LayerSolver(ABC):
    """The running state of one edited layer. It stays good until the change after the next; older ones may
    give up their memory. Put `register_solver` on a class to choose it by name.

    Most rules are one formula for ΔW: see `solvers.step.StepSolver`, which leaves little to write.

    Args:
        prior: the layer before the first edit.
        settings: of this rule, an instance of `Settings`; None for its defaults.

    Raises:
        NumericalError: the rule can't begin with this prior.

    Attributes:
        name: of the layer, for messages.
        Settings: a dataclass whose fields are made by `setting`: the rule's own settings.
        gamma: forgetting factor of the batch that made it; 1 where nothing fades.
        can_drift: whether rounding piles up in it, so that it is summed anew when it does.
        can_retract: whether edits can be taken out.
        solves_objective: whether its weight is the minimum of RLSEdit's objective.
        looks_after: whether it wants to see the keys again behind the batch (`after_batch`).
    """

    name: str
    Settings: ClassVar[type] = NoSettings
    gamma: float = 1.0
    can_drift: ClassVar[bool] = False
    can_retract: ClassVar[bool] = False
    solves_objective: ClassVar[bool] = False
    looks_after: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, prior: Prior, settings: Any = None) -> None: ...

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W_t, (d_k, d_v). Do not write to it; it is good until the change after the next."""

    @property
    @abstractmethod
    def n_edits(self) -> int:
        """Edits taken in and not retracted, faded ones too."""

    @property
    def watch(self) -> WeightWatch | None:
        """Of the weight, where one is kept."""
        return None

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
        """The state with one batch of edits more.

        Args:
            K: keys, (u, d_k), or (u, r, d_k) where each edit has r rows of its own.
            V: target outputs, (u, d_v) or (u, r, d_v).
            importance: diagonal of D, (u,) or (u, r), positive; ones if None.
            same_change: this state is one on the way, which nobody goes back to: the batch belongs to the
                change that made it.
            factor: the `gamma` that a recorded batch had, to make it once more; None for the rule's own.

        Raises:
            NumericalError: a non-finite input, or a matrix that is not positive definite.
            PrecisionError: the dtype can't hold what would come of it.
        """

    def after_batch(self: S, K: Tensor, importance: Tensor | None = None) -> S:
        """The state once all layers are written: K are the batch's keys as they are then, (u, d_k) or
        (u, r, d_k). Called where `looks_after`.
        """
        return self

    def retract(
        self: S, K: Tensor, V: Tensor, importance: Tensor | None = None, *, same_change: bool = False
    ) -> S:
        """The state without some edits, as if they had never been made; arguments as they were given to
        `update`.

        Raises:
            HyperParamsError: the rule can't take edits out (`can_retract`).
            NumericalError: they are not in the state.
        """
        raise HyperParamsError(
            f"The rule of {self.name} can't take edits out, so nothing can be retracted, amended, rehearsed "
            "or superseded. Take solver: rls, forgetting or memit_seq; or on_conflict: keep and rehearsal: 0."
        )

    @abstractmethod
    def adopt(self: S, W: Tensor, *, same_change: bool = False) -> S:
        """The same with a weight that somebody else wrote, (d_k, d_v)."""

    def information(self) -> Tensor:
        """The matrix A of the last step's problem ``A ΔW = …``, (d_k, d_k), float64 where the device has it:
        what error feedback needs (`solvers.filtered`).

        Raises:
            HyperParamsError: the rule has none.
        """
        raise HyperParamsError(
            f"The rule of {self.name} solves no linear system A ΔW = B whose A is symmetric, so its filters' "
            "error can't be fed back. Leave out ote, or put it behind rls, forgetting, memit or memit_seq."
        )

    def covariance(self) -> Tensor:
        """C_t, the inverse of `information`, as a new (d_k, d_k) tensor.

        Raises:
            HyperParamsError: the rule has none.
        """
        raise HyperParamsError(f"The rule of {self.name} has no covariance. Take solver: rls.")

    def variances(self, X: Tensor) -> Tensor:
        """``xᵀ C_t x`` of each column of X, (d_k, p) -> (p,).

        Raises:
            HyperParamsError: the rule has no covariance.
        """
        return ((self.covariance().to(X) @ X) * X).sum(0)

    def drift(self) -> float:
        """Relative error of the covariance, seen through fixed random probes; 0 where none is kept."""
        return 0.0

    def weight_error(self) -> float:
        """What the weight lacks of the rule's solution, as a share of the edit; 0 where it is not watched."""
        return 0.0

    @abstractmethod
    def tensors(self, before: "LayerSolver | None" = None) -> dict[str, Tensor]:
        """The state as tensors for a file, with the one before it, which a roll-back goes to; None for
        none.
        """

    @classmethod
    @abstractmethod
    def from_tensors(
        cls: type[S], stored: Mapping[str, Tensor], name: str, settings: Any
    ) -> tuple[S, S | None]:
        """The state that `tensors` was taken from, and the one before it, bit for bit; they own what they are
        given.

        Args:
            stored: what `tensors` returned, all on one device.
            name: of the layer, for messages.
            settings: of this rule, an instance of `Settings`.

        Raises:
            KeyError: a tensor is missing.
        """

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
