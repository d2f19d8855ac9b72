"""EMMET (Gupta et al. 2024, arXiv 2403.14236): memorize a batch as an equality, disturb ordinary keys
least.

    min tr(ΔWᵀ C ΔW)  with  K ΔW = r          ΔW = B Kᵀ (K B Kᵀ + λ_e I)^-1 r,    B = (n_0 C)^-1

λ_e keeps the u × u matrix well conditioned; with n_0 C in it, it is also what makes the equality soft: EMMET
with λ_e = 1 is MEMIT.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.base import register_solver
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import innovation_factor, spd_inverse
from easyedit_rls.solvers.step import StepSolver


@dataclass(frozen=True)
class EmmetSettings:
    """Of EMMET."""

    n_0: float = setting(
        "How many tokens of ordinary text C stands for.", 100000.0, above=0, search=(10, 100_000)
    )
    ridge: float = setting("λ_e, how soft the equality is.", 0.1, above=0)


@register_solver("emmet")
class Emmet(StepSolver):
    """See above. State: ``prior``, B (d_k, d_k)."""

    Settings = EmmetSettings

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """B."""
        cure = "Use more text for the second moments (mom2_n_samples)."
        return {
            "prior": spd_inverse(prior.second_moment() * self.settings.n_0, f"n_0 C of {self.name}", cure)
        }

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW; nothing is remembered."""
        F = self.state["prior"] @ K.T
        L = innovation_factor(K, F, torch.full_like(K[:, 0], 1 / self.settings.ridge))
        return F @ torch.cholesky_solve(R, L), dict(self.state)
