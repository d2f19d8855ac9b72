"""AlphaEdit (Fang et al. 2025, arXiv 2410.02355, eq. 14): change nothing where ordinary keys are.

    ΔW = (P(S + KᵀK) + L2·I)^-1 P Kᵀ r          P: the eigenvectors of C = E[kkᵀ] below a threshold

S sums KᵀK of the keys as they are after all layers were written; with ``history: before`` as they were used
(Gupta et al. 2025, arXiv 2502.01636: the norm constraint is then L2). ΔW = P ΔW, so the matrix can be made
symmetric, and its factor is Cholesky's:

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

    L2: float = setting("The ridge on a step.", 10.0, above=0)
    threshold: float = setting("Eigenvalues of C below it are free.", 2e-2, above=0)
    history: str = setting("Keys that S takes: as written, or as used.", "after", choices=("after", "before"))


@register_solver("alphaedit")
class AlphaEdit(StepSolver):
    """See above. State: ``P`` and ``A``, (d_k, d_k)."""

    Settings = AlphaEditSettings
    looks_after = True

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """P, and A without keys."""
        P = null_space(prior.second_moment(), self.settings.threshold)
        return {"P": P, "A": torch.eye(len(P), dtype=P.dtype, device=P.device) * self.settings.L2}

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW; the keys enter now, or behind the batch."""
        A = self._with_keys(K)
        change = torch.cholesky_solve(self.state["P"] @ (K.T @ R), cholesky(A, f"AlphaEdit of {self.name}"))
        return change, {**self.state, "A": A} if self.settings.history == "before" else dict(self.state)

    def after(self, K: Tensor) -> dict[str, Tensor]:
        """S with the keys as they are now."""
        return (
            {**self.state, "A": self._with_keys(K)} if self.settings.history == "after" else dict(self.state)
        )

    def _with_keys(self, K: Tensor) -> Tensor:
        KP = K @ self.state["P"]
        return self.state["A"] + KP.T @ KP
