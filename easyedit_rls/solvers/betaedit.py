"""BetaEdit (arXiv 2605.09285): AlphaEdit with ordinary keys weighed in, and a null space that moves.

    ΔW = (P(S + KᵀK + λ1 C) + λ2 I)^-1 P Kᵀ r          C = E[kkᵀ],  S = Σ KᵀK of the batches before

P begins as AlphaEdit's, and each `every` edits is taken anew from the eigenvectors of
(S/n + λ1 C)/(λ1 + 1) below the threshold. As there, ΔW = P ΔW makes the matrix symmetric.
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
class BetaEditSettings:
    """Of BetaEdit."""

    moment_weight: float = setting(
        "λ1, how many tokens of ordinary text C stands for.", 3000.0, above=0, search=(50, 20_000)
    )
    ridge: float = setting("λ2, the ridge on a step.", 10.0, above=0, search=(0.1, 1000))
    threshold: float = setting("Eigenvalues below it are free.", 2e-2, above=0, search=(1e-3, 0.1))
    every: int = setting("Edits after which P is taken anew.", 1000, least=1)


@register_solver("betaedit")
class BetaEdit(StepSolver):
    """See above. State: ``C``, ``P``, ``S``, (d_k, d_k); ``renewed``, edits when P was taken."""

    Settings = BetaEditSettings

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """AlphaEdit's P, and no keys."""
        C = prior.second_moment()
        P = null_space(C, self.settings.threshold)
        return {"C": C, "P": P, "S": torch.zeros_like(C), "renewed": torch.zeros(1, dtype=torch.int64)}

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW, with P taken anew first where it is time."""
        state, own = dict(self.state), self.settings
        if self.n_edits - int(state["renewed"]) >= own.every:
            kept = (state["S"] / self.n_edits + own.moment_weight * state["C"]) / (own.moment_weight + 1)
            state |= {"P": null_space(kept, own.threshold), "renewed": torch.tensor([self.n_edits])}
        P, S = state["P"], state["S"] + K.T @ K
        A = P @ (S + own.moment_weight * state["C"]) @ P
        A.diagonal().add_(own.ridge)
        change = torch.cholesky_solve(P @ (K.T @ R), cholesky(A, f"BetaEdit of {self.name}"))
        return change, {**state, "S": S}
