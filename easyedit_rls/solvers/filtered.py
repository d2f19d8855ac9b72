"""Filters of a step around any rule, with or without feedback of what they took away.

A filter replaces a rule's step ΔW by post(ΔW) (SPHERE, RECT, PRUNE). What it takes away is lost to the rule's
problem A ΔW = B. OTE (arXiv 2605.26670) carries it along and gives it back with the next steps:

    ΔW ← ΔW − A^-1 E          W ← W + post(ΔW)          E ← A (post(ΔW) − ΔW)

with A the rule's matrix after the batch (`LayerSolver.information`): for MEMIT on a stream A_t = n_0 C + S +
KᵀK. With the step before the correction, ΔW', the same is E ← E + A (post(ΔW) − ΔW'). A W = B + E holds
for all batches so far, so W − A^-1 E is the rule's own solution. The rule goes on from the weight that was
written.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError
from easyedit_rls.registry import Registry
from easyedit_rls.solvers.base import LayerSolver, NoSettings, part_of
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import cholesky
from easyedit_rls.solvers.watch import widest_dtype

FILTERS: "Registry[type[Filter]]" = Registry("filter", "easyedit_rls.filters", ("easyedit_rls.solvers",))
register_filter = FILTERS.register


class Filter(ABC):
    """What becomes of a step. Put `register_filter` on a class to write it behind a solver's name.

    Args:
        settings: an instance of `Settings`.
    """

    Settings: ClassVar[type] = NoSettings

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    @abstractmethod
    def __call__(self, step: Tensor, W: Tensor, W_0: Tensor) -> Tensor:
        """The step that is made instead; all are (d_k, d_v), float64 where the device has it.

        Args:
            step: ΔW.
            W: the weight before it.
            W_0: the unedited weight.
        """


@dataclass(frozen=True)
class _Parts:
    """What a filtered state consists of: the rule's state, W_0, and E, None without feedback."""

    inner: LayerSolver
    W_0: Tensor
    E: Tensor | None


class FilteredSolver(LayerSolver):
    """A rule behind filters; see above.

    Args:
        inner: the rule's state before the first edit.
        filters: in the order in which they work.
        feeds_back: whether E is carried.
        prior: the layer before the first edit.
    """

    _parts: _Parts
    filters: tuple[Filter, ...]

    def __init__(self, prior: Prior, settings: Any = None) -> None:
        raise NotImplementedError("A filtered rule is made by `around`.")

    @classmethod
    def around(cls, inner: LayerSolver, filters: tuple[Filter, ...], feeds_back: bool) -> "FilteredSolver":
        """A rule's state before the first edit, behind filters."""
        wide = widest_dtype(inner.weight.device)
        E = torch.zeros_like(inner.weight, dtype=wide) if feeds_back else None
        if feeds_back:
            inner.information()  # refuses here where there is none
        return cls._of(_Parts(inner, inner.weight.clone(), E), filters)

    @classmethod
    def _of(cls, parts: _Parts, filters: tuple[Filter, ...]) -> "FilteredSolver":
        solver = cls.__new__(cls)
        solver._parts, solver.filters = parts, filters
        solver.name, solver.gamma = parts.inner.name, parts.inner.gamma
        solver.looks_after = parts.inner.looks_after  # type: ignore[misc]
        return solver

    @property
    def weight(self) -> Tensor:
        """W_t, (d_k, d_v)."""
        return self._parts.inner.weight

    @property
    def n_edits(self) -> int:
        """Edits taken in."""
        return self._parts.inner.n_edits

    def update(
        self,
        K: Tensor,
        V: Tensor,
        importance: Tensor | None = None,
        *,
        same_change: bool = False,
        factor: float | None = None,
    ) -> "FilteredSolver":
        """The state with one batch of edits more; see `LayerSolver.update`."""
        p = self._parts
        inner = p.inner.update(K, V, importance, same_change=same_change, factor=factor)
        wide = widest_dtype(self.weight.device)
        W, W_0 = self.weight.to(wide), p.W_0.to(wide)
        step, E = inner.weight.to(wide) - W, p.E
        if E is not None:
            A = inner.information().to(wide)
            step = step - torch.cholesky_solve(E, cholesky(A, f"Information of {self.name}"))
        kept = step
        for post in self.filters:
            kept = post(kept, W, W_0)
        if E is not None:
            E = A @ (kept - step)
        W = (W + kept).to(self.weight.dtype)
        if not bool(torch.isfinite(W).all()):
            raise NumericalError(f"A filter left NaN in the weight of {self.name}. Leave it out.")
        return self._of(replace(p, inner=inner.adopt(W, same_change=True), E=E), self.filters)

    def after_batch(self, K: Tensor, importance: Tensor | None = None) -> "FilteredSolver":
        """See `LayerSolver.after_batch`."""
        p = self._parts
        return self._of(replace(p, inner=p.inner.after_batch(K, importance)), self.filters)

    def adopt(self, W: Tensor, *, same_change: bool = False) -> "FilteredSolver":
        """The same with a weight that somebody else wrote, (d_k, d_v)."""
        p = self._parts
        return self._of(replace(p, inner=p.inner.adopt(W, same_change=same_change)), self.filters)

    def covariance(self) -> Tensor:
        """The rule's."""
        return self._parts.inner.covariance()

    def drift(self) -> float:
        """The rule's."""
        return self._parts.inner.drift()

    def tensors(self, before: LayerSolver | None = None) -> dict[str, Tensor]:
        """The state for a file."""
        p = self._parts
        earlier = before._parts if isinstance(before, FilteredSolver) else None
        inner = p.inner.tensors(None if earlier is None else earlier.inner)
        stored = {f"rule.{key}": tensor for key, tensor in inner.items()}
        stored["W_0"] = p.W_0
        if p.E is not None:
            stored["E"] = p.E
        if earlier is not None and earlier.E is not None:
            stored["before.E"] = earlier.E
        return stored

    @classmethod
    def from_tensors(
        cls, stored: Mapping[str, Tensor], name: str, settings: Any
    ) -> "tuple[FilteredSolver, FilteredSolver | None]":
        """Made by `read`, which knows the rule."""
        raise NotImplementedError("A filtered rule is read by `read`.")

    @classmethod
    def read(
        cls,
        stored: Mapping[str, Tensor],
        name: str,
        solver: type[LayerSolver],
        settings: Any,
        filters: tuple[Filter, ...],
    ) -> "tuple[FilteredSolver, FilteredSolver | None]":
        """The state that `tensors` was taken from, and the one before it."""
        inner, before = solver.from_tensors(part_of(stored, "rule."), name, settings)
        last = cls._of(_Parts(inner, stored["W_0"], stored.get("E")), filters)
        if before is None:
            return last, None
        return last, cls._of(_Parts(before, stored["W_0"], stored.get("before.E")), filters)
