"""MEMIT of a stream, with or without a norm constraint: earlier keys stay in the problem.

    A ← A + KᵀK          ΔW = A^-1 Kᵀ r          A_0 = n_0 C + λ_n I,   C = E[kkᵀ] over ordinary text

λ_n = 0 is the rule that AlphaEdit's authors compare with (memit_seq), λ_n > 0 the norm constraint of Gupta
et al. 2025 (ENCORE, arXiv 2502.01636). Since each r is taken at the weight as it is, W is the least-squares
solution of all batches: with λ² = λ_n, μ²K_0ᵀK_0 = n_0 C and targets V = K W + r this is RLSEdit, and what
the tests hold its recursion to. A is carried and factored anew for each batch, O(d_k³).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.base import register_solver
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import cholesky, spd_inverse
from easyedit_rls.solvers.step import StepSolver

_CURE = "Raise norm_weight, or use more text for the second moments (mom2_n_samples)."


@dataclass(frozen=True)
class MemitSeqSettings:
    """Of MEMIT on a stream."""

    n_0: float = setting(
        "How many tokens of ordinary text C stands for.", 15000.0, above=0, search=(50, 20_000)
    )
    norm_weight: float = setting(
        "λ_n, the norm constraint; ENCORE takes 10 to 20.", 0.0, least=0, search=(1e-3, 100)
    )


@register_solver("memit_seq")
class MemitSeq(StepSolver):
    """See above. State: ``A``, (d_k, d_k)."""

    Settings = MemitSeqSettings
    can_retract = True

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """A_0."""
        A = prior.second_moment() * self.settings.n_0
        A.diagonal().add_(self.settings.norm_weight)
        return {"A": A}

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW, and A with the batch's keys."""
        A = self.state["A"] + K.T @ K
        return torch.cholesky_solve(K.T @ R, cholesky(A, f"Information of {self.name}", _CURE)), {"A": A}

    def retract(
        self, K: Tensor, V: Tensor, importance: Tensor | None = None, *, same_change: bool = False
    ) -> "MemitSeq":
        """``A ← A − KᵀDK,  W ← W − A^-1 KᵀD(V − K W)``: the solution of the batches that stay."""
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance, self._wide())
        A = self.state["A"] - K.T @ (D[:, None] * K)
        L = cholesky(A, f"Information of {self.name} without the edits", "Give edits that were made.")
        right = K.T @ (D[:, None] * (V - K @ self.weight.to(K)))
        return self._stepped(-torch.cholesky_solve(right, L), -n_edits, {"A": A})

    def information(self) -> Tensor:
        """A."""
        return self.state["A"]

    def covariance(self) -> Tensor:
        """A^-1, in the weight's dtype."""
        return spd_inverse(self.state["A"], f"Information of {self.name}", _CURE).to(self.weight)
