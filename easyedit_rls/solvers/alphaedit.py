"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355, eq. 14): change nothing where ordinary keys are.

    ΔW = (P(S + KᵀK) + L2·I)^-1 P Kᵀ r          P: the eigenvectors of C = E[kkᵀ] below a threshold

S sums KᵀK. The published code takes keys for it once more when all layers are written. A layer's keys come
from the layers below it, which are written by then, so they are the keys that were used; and AlphaEdit with
the norm constraint (Gupta et al. 2025, arXiv 2502.01636) is the same rule, L2 its constraint. ΔW = P ΔW, so
the matrix can be made symmetric, and its factor is Cholesky's:

    A = P S P + L2·I          ΔW = (A + P KᵀK P)^-1 P Kᵀ r
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.base import register_solver
from easyedit_rls.solvers.prior import Prior, null_space
from easyedit_rls.solvers.spd import cholesky
from easyedit_rls.solvers.step import StepSolver


@dataclass(frozen=True)
class AlphaEditSettings:
    """Of AlphaEdit."""

    L2: float = setting("The ridge on a step.", 10.0, above=0, search=(0.1, 1000))
    threshold: float = setting("Eigenvalues of C below it are free.", 2e-2, above=0, search=(1e-3, 0.1))


@register_solver("alphaedit")
class AlphaEdit(StepSolver):
    """See above. State: ``P`` and ``A``, (d_k, d_k)."""

    Settings = AlphaEditSettings

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """P, and A without keys."""
        P = null_space(prior.second_moment(), self.settings.threshold)
        return {"P": P, "A": torch.eye(len(P), dtype=P.dtype, device=P.device) * self.settings.L2}

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW, and A with the batch's keys."""
        KP = K @ self.state["P"]
        A = self.state["A"] + KP.T @ KP
        change = torch.cholesky_solve(KP.T @ R, cholesky(A, f"AlphaEdit of {self.name}"))
        return change, {**self.state, "A": A}
