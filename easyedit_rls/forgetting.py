"""Recursive least squares that forgets: the solution of one edited layer in information form.

With a forgetting factor γ_t in (0, 1] for each batch, older edits count less while both soft constraints stay (legend as in
`recursion`; P = A_0 is the prior's information, W_p the weight that the soft constraints alone give):

    J_t(W) = Σ_i (Π_{i<s≤t} γ_s) ‖D_i^½ (K_i W − V_i)‖² + λ²‖W − W_0‖² + μ²‖K_0 W − V_0‖²

The prior must not fade with the data, so Woodbury's step no longer applies: A itself is carried, and factored at each batch, O(d_k³),

    A ← γ A + (1 − γ) P + KᵀDK           W ← W + A^-1 (KᵀD (V − K W) − (1 − γ) P (W − W_p))

The adaptive factor keeps the information in the memory constant (Fortescue, Kershenbaum & Ydstie 1981, eq. 12, for a batch of
vector-valued outputs): with the innovation E = V − K W and S = D^-1 + K C Kᵀ,

    γ = 1 − tr(Eᵀ S^-1 E) / (N_0 σ²)     σ² the mean of tr(Eᵀ S^-1 E) an edit so far, N_0 the memory in edits

so a batch as surprising as usual fades the past by u/N_0, a surprising one more, a foreseen one less.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError
from easyedit_rls.linalg import cholesky, information_drift, row_major, spd_inverse, symmetrize_
from easyedit_rls.recursion import flat_rows, prior, probes
from easyedit_rls.revertible import Revertible
from easyedit_rls.symmetric import PackedSymmetric

_LEAST_FACTOR = 0.5  # one batch never fades the past by more than half
_CURE = "Raise lambda_reg, or use more text for the second moments (mom2_n_samples)."


@dataclass(frozen=True)
class _Step:
    """One change of the information: ``A ← γ A + (1 − γ) P + KᵀDK``; removals have negative D."""

    K: Tensor  # shape: (u, d_k)
    D: Tensor  # shape: (u,)
    gamma: float


@dataclass(frozen=True)
class _Pending:
    """What the last change does, not yet folded into the committed state."""

    steps: tuple[_Step, ...]
    W: Tensor  # shape: (d_k, d_v)
    n_edits: int
    surprise: tuple[float, float]  # sum of tr(Eᵀ S^-1 E), edits summed over
    drift: float


class ForgettingLeastSquares(Revertible[_Pending]):
    """Running solution of one layer's regularised least-squares problem, older edits fading. Interface as `RecursiveLeastSquares`.

    A and P are kept in float64 where the device has it: two (d_k, d_k) matrices of twice the covariance's size.

    Args:
        W_0: unedited weight, (d_k, d_v), float32 or float64: the dtype of the solution.
        gram: ``K_0ᵀK_0``, (d_k, d_k), or None for no anchor term.
        lambda_reg: λ ≥ 0, weight of the pull toward W_0.
        mu_reg: μ ≥ 0, weight of the pull toward the anchor mapping.
        anchor_cross: ``K_0ᵀV_0``, (d_k, d_v); None means V_0 = K_0 W_0.
        factor: γ in (0, 1] for every batch, or None for the adaptive one.
        memory: N_0, in edits, for the adaptive factor.
        name: of the layer, for messages.

    Raises:
        NumericalError: ``A_0`` is not positive definite or not finite.
    """

    def __init__(
        self,
        W_0: Tensor,
        gram: Tensor | None,
        *,
        lambda_reg: float,
        mu_reg: float,
        anchor_cross: Tensor | None = None,
        factor: float | None,
        memory: float = 1000.0,
        name: str = "layer",
    ) -> None:
        A, _, W = prior(W_0, gram, lambda_reg=lambda_reg, mu_reg=mu_reg, anchor_cross=anchor_cross, name=name)
        self.name = name
        self.factor, self.memory = factor, memory
        self._P, self._A = A, A.clone()
        self._W_p, self._W = W, W.to(W_0.dtype).clone()
        self._n_edits = 0
        self._surprise = (0.0, 0.0)
        self._drift = 0.0
        self._pending = None

    def covariance(self) -> Tensor:
        """C_t as a new (d_k, d_k) tensor in the solution's dtype; costs an inversion."""
        return spd_inverse(self._information(), f"Information matrix of {self.name}", _CURE).to(self._W)

    def update(
        self, K: Tensor, V: Tensor, importance: Tensor | None = None, *, joins_last: bool = False, factor: float | None = None
    ) -> float:
        """Fade what came before, then take in one batch of edits. Until the next change, `rollback` undoes it exactly.

        Args:
            K: keys, (u, d_k), or (u, r, d_k) where each edit has r rows of its own.
            V: target outputs, (u, d_v) or (u, r, d_v).
            importance: diagonal of D, (u,) or (u, r), positive; ones if None.
            joins_last: make it part of the change before, so that `rollback` undoes both.
            factor: γ of this batch instead of the object's own rule: to replay a stream.

        Returns:
            γ of this batch.

        Raises:
            NumericalError: a non-finite input, or an information matrix that is not positive definite. The state is then as before.
        """
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance)
        if not joins_last:
            self.commit()
        W = self.weight.to(K)
        E = V - K @ W
        gamma, surprise = self.factor if factor is None else factor, self._seen()
        if self.factor is None:
            now = self._surprise_of(K, D, E)
            surprise = (surprise[0] + now, surprise[1] + n_edits)
            gamma = self._adapt(now, surprise) if gamma is None else gamma
        step = _Step(K, D, 1.0 if gamma is None else gamma)
        A = self._apply_(self._information(), step)
        L = cholesky(A, f"Information matrix of {self.name}", _CURE)
        right = K.T @ (D[:, None] * E) - (1.0 - step.gamma) * (self._P @ (W - self._W_p))
        Z = probes(self._P)
        drift = information_drift(A @ torch.cholesky_solve(Z, L), Z)
        self._add(step, W + torch.cholesky_solve(right, L), n_edits, surprise, drift)
        return step.gamma

    def retract(self, K: Tensor, V: Tensor, importance: Tensor | None = None, *, joins_last: bool = False) -> None:
        """Remove edits from the objective exactly, as if they had never been made.

        Args:
            K: keys that were given to `update`, (u, d_k) or (u, r, d_k).
            V: their target outputs, (u, d_v) or (u, r, d_v).
            importance: what is left of their importances: those given to `update` times every γ since, (u,) or (u, r).
            joins_last: make it part of the change before, so that `rollback` undoes both.

        Raises:
            NumericalError: the edits are not in the state (what is left is not positive definite). The state is then as before.
        """
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance)
        if not joins_last:
            self.commit()
        W = self.weight.to(K)
        step = _Step(K, -D, 1.0)
        cure = "These edits are not part of the state: give those that were made."
        L = cholesky(self._apply_(self._information(), step), f"Information matrix of {self.name} without the edits", cure)
        self._add(step, W - torch.cholesky_solve(K.T @ (D[:, None] * (V - K @ W)), L), -n_edits, self._seen(), self.drift())

    def commit(self) -> None:
        """Make the last change permanent: `rollback` can't undo it any more."""
        pending = self._pending
        if pending is None:
            return
        A = self._information()
        self._A, self._W, self._n_edits, self._pending = A, pending.W, pending.n_edits, None
        self._surprise, self._drift = pending.surprise, pending.drift

    def drift(self) -> float:
        """Relative error of the last batch's solve, seen through fixed random probes; A itself does not drift."""
        return self._drift if self._pending is None else self._pending.drift

    def tensors(self) -> dict[str, Tensor]:
        """The whole state as tensors that `from_tensors` takes, the pending change included; A and P are stored by half."""
        numbers = [self.factor or 0.0, self.memory, *self._surprise, self._drift]
        stored = {key: PackedSymmetric.of(M).to_vector() for key, M in (("P", self._P), ("A", self._A))}
        stored |= {"W_p": self._W_p, "W": self._W}
        stored |= {"n_edits": torch.tensor([self._n_edits]), "numbers": torch.tensor(numbers, dtype=torch.float64)}
        if self._pending is not None:
            stored |= {"pending.W": self._pending.W, "pending.n_edits": torch.tensor([self._pending.n_edits])}
            stored["pending.numbers"] = torch.tensor([*self._pending.surprise, self._pending.drift], dtype=torch.float64)
            for i, step in enumerate(self._pending.steps):
                stored |= {f"pending.K.{i}": step.K, f"pending.D.{i}": step.D}
                stored[f"pending.gamma.{i}"] = torch.tensor([step.gamma], dtype=torch.float64)
        return stored

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], name: str) -> "ForgettingLeastSquares":
        """The state that `tensors` was taken from, bit for bit; owns what it is given."""
        state = cls.__new__(cls)
        state.name = name
        factor, state.memory, *surprise, state._drift = stored["numbers"].tolist()
        state.factor, state._surprise = factor or None, (surprise[0], surprise[1])
        state._W, state._W_p = stored["W"], stored["W_p"]
        state._P, state._A = (PackedSymmetric.from_vector(stored[key], len(state._W)).full() for key in ("P", "A"))
        state._n_edits, state._pending = int(stored["n_edits"]), None
        if "pending.W" in stored:
            n = sum(key.startswith("pending.K.") for key in stored)
            steps = (_Step(stored[f"pending.K.{i}"], stored[f"pending.D.{i}"], float(stored[f"pending.gamma.{i}"])) for i in range(n))
            first, second, drift = stored["pending.numbers"].tolist()
            state._pending = _Pending(tuple(steps), stored["pending.W"], int(stored["pending.n_edits"]), (first, second), drift)
        return state

    def _checked(self, K: Tensor, V: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        K, V, D = flat_rows(K, V, torch.ones(K.shape[:-1]) if importance is None else importance)
        K, V, D = row_major(K, self._P), row_major(V, self._P), D.to(self._P)
        for label, tensor in (("Keys", K), ("Target outputs", V), ("Importances", D)):
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"{label} of {self.name} hold NaN or infinite entries. Check the model's weights for NaN.")
        return K, V, D

    def _information(self) -> Tensor:
        """A_t as a new tensor, the pending change included."""
        A = self._A.clone()
        for step in () if self._pending is None else self._pending.steps:
            self._apply_(A, step)
        return A

    def _apply_(self, A: Tensor, step: _Step) -> Tensor:
        """``A ← γ A + (1 − γ) P + KᵀDK`` in place, kept exactly symmetric."""
        if step.gamma != 1.0:
            A.mul_(step.gamma).add_(self._P, alpha=1.0 - step.gamma)
        return symmetrize_(A.addmm_(step.K.T, step.D[:, None] * step.K))

    def _surprise_of(self, K: Tensor, D: Tensor, E: Tensor) -> float:
        """tr(Eᵀ S^-1 E) with ``S^-1 E = D (E − K A^-1 KᵀDE)``, A taking the batch in without fading."""
        L = cholesky(self._apply_(self._information(), _Step(K, D, 1.0)), f"Information matrix of {self.name}", _CURE)
        DE = D[:, None] * E
        return float((DE * (E - K @ torch.cholesky_solve(K.T @ DE, L))).sum())

    def _seen(self) -> tuple[float, float]:
        return self._surprise if self._pending is None else self._pending.surprise

    def _adapt(self, now: float, surprise: tuple[float, float]) -> float:
        """The adaptive γ of a batch whose tr(Eᵀ S^-1 E) is `now`; `surprise` has it already."""
        sigma2 = surprise[0] / surprise[1]
        return 1.0 if sigma2 <= 0 else min(1.0, max(_LEAST_FACTOR, 1.0 - now / (self.memory * sigma2)))

    def _add(self, step: _Step, W: Tensor, n_edits: int, surprise: tuple[float, float], drift: float) -> None:
        W = row_major(W, self._W)
        if not bool(torch.isfinite(W).all()):
            raise NumericalError(f"The new weight of {self.name} holds NaN or infinite entries. Raise lambda_reg or mu_reg.")
        before = () if self._pending is None else self._pending.steps
        self._pending = _Pending((*before, step), W, self.n_edits + n_edits, surprise, drift)
