"""A rule that is one formula: ΔW from keys, residuals and a small state."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError
from easyedit_rls.solvers.base import LayerSolver, part_of
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.watch import widest_dtype


@dataclass(frozen=True)
class _Parts:
    """What a state consists of: the weight, (d_k, d_v); edits in it; the rule's own tensors."""

    W: Tensor
    n_edits: int
    state: Mapping[str, Tensor]


T = TypeVar("T", bound="StepSolver")


class StepSolver(LayerSolver):
    """A rule that says `start` and `step`, and `after` where it looks at keys once more. All it computes is
    in float64 where the device has it; the weight keeps its own dtype.

    Importances are in the rows already: with ``D^½K`` and ``D^½r`` for K and r every formula is that of the
    weighted problem.
    """

    _parts: _Parts
    settings: Any

    def __init__(self, prior: Prior, settings: Any = None) -> None:
        self.name, self.settings = prior.name, self.Settings() if settings is None else settings
        self._parts = _Parts(prior.W_0.clone(memory_format=torch.contiguous_format), 0, self.start(prior))

    @abstractmethod
    def start(self, prior: Prior) -> dict[str, Tensor]:
        """The rule's own tensors before the first edit."""

    @abstractmethod
    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW, (d_k, d_v), and the rule's own tensors after it; nothing is written in place.

        Args:
            K: keys, (rows, d_k).
            R: residuals ``V − K W``, (rows, d_v).
        """

    def after(self, K: Tensor) -> dict[str, Tensor]:
        """The rule's own tensors once all layers are written; K are the keys as they are then."""
        return dict(self.state)

    @property
    def state(self) -> Mapping[str, Tensor]:
        """The rule's own tensors."""
        return self._parts.state

    @property
    def weight(self) -> Tensor:
        """W_t, (d_k, d_v). Do not write to it."""
        return self._parts.W

    @property
    def n_edits(self) -> int:
        """Edits taken in and not retracted."""
        return self._parts.n_edits

    def update(
        self: T,
        K: Tensor,
        V: Tensor,
        importance: Tensor | None = None,
        *,
        same_change: bool = False,
        factor: float | None = None,
    ) -> T:
        """The state with one batch of edits more; see `LayerSolver.update`."""
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance, self._wide())
        root = D.sqrt()[:, None]
        change, state = self.step(root * K, root * (V - K @ self.weight.to(K)))
        return self._stepped(change, n_edits, state)

    def after_batch(self: T, K: Tensor, importance: Tensor | None = None) -> T:
        """The state once all layers are written; see `LayerSolver.after_batch`."""
        V = torch.zeros(*K.shape[:-1], self.weight.shape[1], dtype=K.dtype, device=K.device)
        K, _, D = self._checked(K, V, importance, self._wide())
        return self._with(replace(self._parts, state=self.after(D.sqrt()[:, None] * K)))

    def adopt(self: T, W: Tensor, *, same_change: bool = False) -> T:
        """The same with a weight that somebody else wrote, (d_k, d_v)."""
        return self._with(replace(self._parts, W=W.to(self.weight, copy=True)))

    def tensors(self, before: LayerSolver | None = None) -> dict[str, Tensor]:
        """The state for a file; what the one before it shares with it is stored once."""
        stored = {"W": self.weight, "n_edits": torch.tensor([self.n_edits]), **self.state}
        if isinstance(before, StepSolver):
            stored |= {"before.W": before.weight, "before.n_edits": torch.tensor([before.n_edits])}
            stored |= {
                f"before.{name}": tensor
                for name, tensor in before.state.items()
                if self.state.get(name) is not tensor
            }
        return stored

    @classmethod
    def from_tensors(
        cls: type[T], stored: Mapping[str, Tensor], name: str, settings: Any
    ) -> tuple[T, T | None]:
        """See `LayerSolver.from_tensors`."""
        own = {key: tensor for key, tensor in stored.items() if not key.startswith("before.")}
        earlier = part_of(stored, "before.")
        last = cls._from_plain(own, name, settings)
        return last, cls._from_plain({**own, **earlier}, name, settings) if earlier else None

    @classmethod
    def _from_plain(cls: type[T], stored: Mapping[str, Tensor], name: str, settings: Any) -> T:
        solver = cls.__new__(cls)
        solver.name, solver.settings = name, settings
        state = {key: tensor for key, tensor in stored.items() if key not in ("W", "n_edits")}
        solver._parts = _Parts(stored["W"], int(stored["n_edits"]), state)
        return solver

    def _with(self: T, parts: _Parts) -> T:
        solver = type(self).__new__(type(self))
        solver.name, solver.settings, solver._parts = self.name, self.settings, parts
        return solver

    def _stepped(self: T, change: Tensor, n_edits: int, state: Mapping[str, Tensor]) -> T:
        W = (self.weight.to(change) + change).to(self.weight.dtype).contiguous()
        if not bool(torch.isfinite(W).all()):
            raise NumericalError(
                f"The new weight of {self.name} holds NaN or infinite entries. "
                "Raise the rule's ridge or n_0 (solver_settings)."
            )
        return self._with(_Parts(W, self.n_edits + n_edits, state))

    def _wide(self) -> Tensor:
        """What inputs become like."""
        return torch.empty((), dtype=widest_dtype(self.weight.device), device=self.weight.device)
