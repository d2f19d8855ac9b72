"""EvoEdit (arXiv 2510.13851, of RLSEdit's authors): the null space evolves, the history is in it.

    ΔW = P Kᵀ (K P Kᵀ + L2 I)^-1 r          then  P ← P − Q Qᵀ,  Q the left singular vectors of P Kᵀ

P begins as AlphaEdit's. What a batch has used is no longer free, so no sum of keys is kept and the cost is
O(d_k² u) whatever came before; but P's rank runs out after some d_k edits, and a batch whose ‖P Kᵀ‖ is below
`least` is not written at all. Singular vectors whose value is rounding are left out of Q: they need not lie
in P's range.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.base import register_solver
from easyedit_rls.solvers.prior import Prior, null_space
from easyedit_rls.solvers.spd import innovation_factor
from easyedit_rls.solvers.step import StepSolver


@dataclass(frozen=True)
class EvoEditSettings:
    """Of EvoEdit."""

    L2: float = setting("The ridge on a step.", 4.0, above=0, search=(0.1, 1000))
    threshold: float = setting(
        "Eigenvalues of C below it are free at the start.", 2e-2, above=0, search=(1e-3, 0.1)
    )
    least: float = setting("‖P Kᵀ‖ below which a batch is not written.", 1e-3, least=0)


@register_solver("evoedit")
class EvoEdit(StepSolver):
    """See above. State: ``P``, (d_k, d_k)."""

    Settings = EvoEditSettings

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """AlphaEdit's P."""
        return {"P": null_space(prior.second_moment(), self.settings.threshold)}

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW, and P without what it used."""
        P = self.state["P"]
        F = P @ K.T
        if float(F.norm()) < self.settings.least:
            return torch.zeros(len(P), R.shape[1], dtype=P.dtype, device=P.device), {"P": P}
        L = innovation_factor(K, F, torch.full_like(K[:, 0], 1 / self.settings.L2))
        U, sizes, _ = torch.linalg.svd(F, full_matrices=False)
        Q = U[:, sizes > sizes[0] * max(F.shape) * torch.finfo(F.dtype).eps]
        return F @ torch.cholesky_solve(R, L), {"P": P - Q @ Q.T}
