"""MEMIT (Meng et al. 2023, arXiv 2210.07229, eq. 14): each batch by itself.

    ΔW = (n_0 C + KᵀK)^-1 Kᵀ r          C = E[kkᵀ] over ordinary text

With B = (n_0 C)^-1, made once, Woodbury's identity gives the same from a u × u system, at O(d_k² u) a batch:

    ΔW = B Kᵀ (I + K B Kᵀ)^-1 r

Earlier batches are not in it, so each one may undo what came before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.base import register_solver
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import innovation_factor, spd_inverse
from easyedit_rls.solvers.step import StepSolver

_CURE = "Use more text for the second moments (mom2_n_samples)."


@dataclass(frozen=True)
class MemitSettings:
    """Of MEMIT."""

    n_0: float = setting(
        "How many tokens of ordinary text C stands for.", 15000.0, above=0, search=(50, 20_000)
    )


@register_solver("memit")
class Memit(StepSolver):
    """See above. State: ``prior``, B (d_k, d_k); ``K``, the last batch's keys."""

    Settings = MemitSettings

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """B, and no keys."""
        moment = prior.second_moment()
        B = spd_inverse(moment * self.settings.n_0, f"n_0 C of {self.name}", _CURE)
        return {"prior": B, "K": moment[:0]}

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW by Woodbury's identity."""
        F = self.state["prior"] @ K.T
        L = innovation_factor(K, F, torch.ones_like(K[:, 0]))
        return F @ torch.cholesky_solve(R, L), {**self.state, "K": K}

    def information(self) -> Tensor:
        """``n_0 C + KᵀK`` of the last batch."""
        A = spd_inverse(self.state["prior"], f"(n_0 C)^-1 of {self.name}", _CURE)
        return A + self.state["K"].T @ self.state["K"]
