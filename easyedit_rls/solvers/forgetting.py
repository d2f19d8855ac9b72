"""Recursive least squares that forgets: the solution of one edited layer in information form.

With a forgetting factor γ_t in (0, 1] for each batch, older edits count less while both soft constraints stay
(legend as in `rls`; P = A_0 is the prior's information, W_p the weight that the soft constraints alone
give):

    J_t(W) = Σ_i (Π_{i<s≤t} γ_s) ‖D_i^½ (K_i W − V_i)‖² + λ²‖W − W_0‖² + μ²‖K_0 W − V_0‖²

The prior must not fade with the data, so Woodbury's step no longer applies: A itself is carried, and factored
at each batch, O(d_k³),

    A ← γ A + (1 − γ) P + KᵀDK           W ← W + A^-1 (KᵀD (V − K W) − (1 − γ) P (W − W_p))

The adaptive factor keeps the information in the memory constant (Fortescue, Kershenbaum & Ydstie 1981, eq.
12, for a batch of vector-valued outputs): with the innovation E = V − K W and S = D^-1 + K C Kᵀ,

    γ = 1 − tr(Eᵀ S^-1 E) / (N_0 σ²)     σ² the mean of tr(Eᵀ S^-1 E) an edit so far, N_0 the memory in edits

so a batch as surprising as usual fades the past by u/N_0, a surprising one more, a foreseen one less.

A solution is a value, as in `solvers.rls`: a change makes a new one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.errors import NumericalError
from easyedit_rls.solvers.base import LayerSolver, part_of, register_solver
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import cholesky, information_drift, row_major, spd_inverse, symmetrize_
from easyedit_rls.solvers.watch import probes

_LEAST_FACTOR = 0.5  # one batch never fades the past by more than half
_CURE = "Raise lambda_reg, or use more text for the second moments (mom2_n_samples)."


@dataclass(frozen=True)
class _Step:
    """One change of the information: ``A ← γ A + (1 − γ) P + KᵀDK``; removals have negative D."""

    K: Tensor  # shape: (u, d_k)
    D: Tensor  # shape: (u,)
    gamma: float


@dataclass(frozen=True)
class _Prior:
    """What the soft constraints alone say, and how edits fade; solutions of one stream share it."""

    P: Tensor  # shape: (d_k, d_k)
    W_p: Tensor  # shape: (d_k, d_v)
    factor: float | None
    memory: float


@dataclass(frozen=True)
class _Parts:
    """What a solution consists of.

    Attributes:
        prior: shared.
        A: information, (d_k, d_k); the solution before shares it, or the one after.
        steps: of the last change.
        W: weight, (d_k, d_v).
        n_edits: edits in it.
        surprise: sum of tr(Eᵀ S^-1 E), and edits summed over.
        drift: relative error of the last solve.
        is_whole: whether the steps are in A.
    """

    prior: _Prior
    A: Tensor
    steps: tuple[_Step, ...]
    W: Tensor
    n_edits: int
    surprise: tuple[float, float]
    drift: float
    is_whole: bool = False


@dataclass(frozen=True)
class ForgettingSettings:
    """Of the rule that forgets."""

    factor: Any = setting(
        "γ: by how much each batch fades the edits before it.",
        "adaptive",
        above=0,
        most=1,
        search=(0.9, 1.0),
        word="adaptive",
    )
    memory: float = setting("For 'adaptive': N_0, how many edits' information stays.", 1000.0, least=1)


@register_solver("forgetting")
class ForgettingLeastSquares(LayerSolver):
    """Running solution of one layer's regularized least-squares problem, older edits fading. Interface as
    `RecursiveLeastSquares`.

    A, P and W are kept in float64 where the device has it: two (d_k, d_k) matrices of twice the covariance's
    size. An edit of great importance that is taken out again leaves the rounding of W times its importance
    behind.

    Args:
        prior: of the layer.
        settings: how edits fade; None takes the defaults.

    Raises:
        NumericalError: ``A_0`` is not positive definite or not finite.
    """

    _parts: _Parts
    Settings = ForgettingSettings
    can_retract = True
    solves_objective = True

    def __init__(self, prior: Prior, settings: ForgettingSettings | None = None) -> None:
        A, _, W = prior.solve()
        own = settings or ForgettingSettings()
        factor = None if own.factor == "adaptive" else float(own.factor)
        self.name = prior.name
        self._parts = _Parts(_Prior(A, W, factor, own.memory), A, (), W.clone(), 0, (0.0, 0.0), 0.0)

    @property
    def weight(self) -> Tensor:
        """W_t, (d_k, d_v). Do not write to it; it is good until the change after the next."""
        return self._parts.W

    @property
    def n_edits(self) -> int:
        """Edits taken in and not retracted, faded ones too."""
        return self._parts.n_edits

    @classmethod
    def _of(cls, parts: _Parts, name: str, gamma: float = 1.0) -> "ForgettingLeastSquares":
        solution = cls.__new__(cls)
        solution.name, solution._parts, solution.gamma = name, parts, gamma
        return solution

    def covariance(self) -> Tensor:
        """C_t as a new (d_k, d_k) tensor in the solution's dtype; costs an inversion."""
        return spd_inverse(self.information(), f"Information matrix of {self.name}", _CURE).to(self.weight)

    def variances(self, X: Tensor) -> Tensor:
        """``xᵀ C_t x`` of each column of X, (d_k, p) -> (p,), by one solution of A."""
        A = self.information()
        L = cholesky(A, f"Information matrix of {self.name}", _CURE)
        found: Tensor = torch.linalg.solve_triangular(L, X.to(A), upper=False).square().sum(0)
        return found

    def information(self) -> Tensor:
        """A_t as a new (d_k, d_k) tensor, float64 where the device has it."""
        A = self._parts.A.clone()
        for step in () if self._parts.is_whole else self._parts.steps:
            self._apply_(A, step)
        return A

    def update(
        self,
        K: Tensor,
        V: Tensor,
        importance: Tensor | None = None,
        *,
        same_change: bool = False,
        factor: float | None = None,
    ) -> "ForgettingLeastSquares":
        """The solution with one batch of edits more, what came before faded; `gamma` of the new one says by
        how much. See `LayerSolver.update`.
        """
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance, self._parts.A)
        prior = self._parts.prior
        W = self.weight.to(K)
        E = V - K @ W
        gamma, surprise = prior.factor if factor is None else factor, self._parts.surprise
        if prior.factor is None and n_edits:
            now = self._surprise_of(K, D, E)
            surprise = (surprise[0] + now, surprise[1] + n_edits)
            gamma = self._adapt(now, surprise) if gamma is None else gamma
        step = _Step(K, D, 1.0 if gamma is None else gamma)
        A = self._apply_(self.information(), step)
        L = cholesky(A, f"Information matrix of {self.name}", _CURE)
        right = K.T @ (D[:, None] * E) - (1.0 - step.gamma) * (prior.P @ (W - prior.W_p))
        Z = probes(A)
        drift = information_drift(A @ torch.cholesky_solve(Z, L), Z)
        return self._changed(step, W + torch.cholesky_solve(right, L), n_edits, surprise, drift, same_change)

    def retract(
        self, K: Tensor, V: Tensor, importance: Tensor | None = None, *, same_change: bool = False
    ) -> "ForgettingLeastSquares":
        """The solution without some edits, as if they had never been made.

        Args:
            K: keys that were given to `update`, (u, d_k) or (u, r, d_k).
            V: their target outputs, (u, d_v) or (u, r, d_v).
            importance: what is left of their importances: those given to `update` times every γ since, (u,)
                or (u, r).
            same_change: see `update`.

        Raises:
            NumericalError: the edits are not in the state (what is left is not positive definite).
        """
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance, self._parts.A)
        W = self.weight.to(K)
        step = _Step(K, -D, 1.0)
        cure = "These edits are not part of the state: give those that were made."
        L = cholesky(
            self._apply_(self.information(), step),
            f"Information matrix of {self.name} without the edits",
            cure,
        )
        W = W - torch.cholesky_solve(K.T @ (D[:, None] * (V - K @ W)), L)
        return self._changed(step, W, -n_edits, self._parts.surprise, self.drift(), same_change)

    def adopt(self, W: Tensor, *, same_change: bool = False) -> "ForgettingLeastSquares":
        """The same information with a weight that somebody else wrote, (d_k, d_v)."""
        return self._of(replace(self._parts, W=W.to(self.weight, copy=True)), self.name)

    def drift(self) -> float:
        """Relative error of the last batch's solve, seen through fixed random probes; A itself does not
        drift.
        """
        return self._parts.drift

    def weight_error(self) -> float:
        """The same: each batch's weight comes from a solve with A."""
        return self._parts.drift

    def tensors(self, before: LayerSolver | None = None) -> dict[str, Tensor]:
        """The solution as tensors that `from_tensors` takes; A and P are stored by half.

        Args:
            before: the solution that a roll-back goes to, to be stored with it; None for none.
        """
        p = self._parts
        base = before if isinstance(before, ForgettingLeastSquares) else self
        A, b = base.information(), base._parts
        numbers = [p.prior.factor or 0.0, p.prior.memory, *b.surprise, b.drift]
        stored = {key: PackedSymmetric.from_dense(M).to_vector() for key, M in (("P", p.prior.P), ("A", A))}
        stored |= {"W_p": p.prior.W_p, "W": b.W}
        stored |= {
            "n_edits": torch.tensor([b.n_edits]),
            "numbers": torch.tensor(numbers, dtype=torch.float64),
        }
        if base is not self:
            stored |= {"pending.W": p.W, "pending.n_edits": torch.tensor([p.n_edits])}
            stored["pending.numbers"] = torch.tensor([*p.surprise, p.drift], dtype=torch.float64)
            for i, step in enumerate(p.steps):
                stored |= {f"pending.K.{i}": step.K, f"pending.D.{i}": step.D}
                stored[f"pending.gamma.{i}"] = torch.tensor([step.gamma], dtype=torch.float64)
        return stored

    @classmethod
    def from_tensors(
        cls, stored: Mapping[str, Tensor], name: str, settings: Any = None
    ) -> tuple["ForgettingLeastSquares", "ForgettingLeastSquares | None"]:
        """See `LayerSolver.from_tensors`."""
        factor, memory, first, second, drift = stored["numbers"].tolist()
        P, A = (PackedSymmetric.from_vector(stored[key], len(stored["W"])).to_dense() for key in ("P", "A"))
        prior = _Prior(P, stored["W_p"].to(P), factor or None, memory)
        base = cls._of(
            _Parts(prior, A, (), stored["W"].to(A), int(stored["n_edits"]), (first, second), drift), name
        )
        pending = part_of(stored, "pending.")
        if not pending:
            return base, None
        n = sum(key.startswith("K.") for key in pending)
        steps = tuple(
            _Step(pending[f"K.{i}"], pending[f"D.{i}"], float(pending[f"gamma.{i}"])) for i in range(n)
        )
        first, second, drift = pending["numbers"].tolist()
        return cls._of(
            _Parts(prior, A, steps, pending["W"].to(A), int(pending["n_edits"]), (first, second), drift), name
        ), base

    def _apply_(self, A: Tensor, step: _Step) -> Tensor:
        """``A ← γ A + (1 − γ) P + KᵀDK`` in place, kept exactly symmetric."""
        if step.gamma != 1.0:
            A.mul_(step.gamma).add_(self._parts.prior.P, alpha=1.0 - step.gamma)
        return symmetrize_(A.addmm_(step.K.T, step.D[:, None] * step.K))

    def _surprise_of(self, K: Tensor, D: Tensor, E: Tensor) -> float:
        """tr(Eᵀ S^-1 E) with ``S^-1 E = D (E − K A^-1 KᵀDE)``, A taking the batch in without fading."""
        L = cholesky(
            self._apply_(self.information(), _Step(K, D, 1.0)), f"Information matrix of {self.name}", _CURE
        )
        DE = D[:, None] * E
        return float((DE * (E - K @ torch.cholesky_solve(K.T @ DE, L))).sum())

    def _adapt(self, now: float, surprise: tuple[float, float]) -> float:
        """The adaptive γ of a batch whose tr(Eᵀ S^-1 E) is `now`; `surprise` has it already."""
        sigma2 = surprise[0] / surprise[1]
        return (
            1.0
            if sigma2 <= 0
            else min(1.0, max(_LEAST_FACTOR, 1.0 - now / (self._parts.prior.memory * sigma2)))
        )

    def _changed(
        self,
        step: _Step,
        W: Tensor,
        n_edits: int,
        surprise: tuple[float, float],
        drift: float,
        same_change: bool,
    ) -> "ForgettingLeastSquares":
        W = row_major(W, self.weight)
        if not bool(torch.isfinite(W).all()):
            raise NumericalError(
                f"The new weight of {self.name} holds NaN or infinite entries. Raise lambda_reg or mu_reg."
            )
        if (
            not same_change and not self._parts.is_whole
        ):  # the same in another form, so that both solutions share one A
            self._parts = replace(self._parts, A=self.information(), is_whole=True)
        parts = replace(self._parts, W=W, n_edits=self.n_edits + n_edits, surprise=surprise, drift=drift)
        if same_change:
            return self._of(replace(parts, steps=(*parts.steps, step)), self.name, step.gamma)
        return self._of(replace(parts, steps=(step,), is_whole=False), self.name, step.gamma)
