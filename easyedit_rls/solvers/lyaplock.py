"""LyapLock (arXiv 2505.15702): least squares whose anchor weight follows a queue of harm done.

    ΔW = [KᵀK + S + aZ n_0 C]^-1 [Kᵀ r + aZ n_0 C (W_0 − W) + Σ K_pᵀV_p − S W]        V_p = K_p W as written

S and the sum are over the batches before. The harm is the preservation loss, PL = tr((W − W_0)ᵀ C (W − W_0)).
The first batch has aZ = 1 and no history; D is its PL, and from then on, with a = 1/√(αD),

    Z ← max(Z + a (PL − αD), √(αD))          Z_0 = √(αD)

so aZ stays 1 while PL is below αD, and grows with what exceeds it. This is RLSEdit with a μ² that a queue
chooses anew for each batch, at O(d_k³). v, the published weight of edits, is 1 there and here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.base import register_solver
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import cholesky
from easyedit_rls.solvers.step import StepSolver

_CURE = "Raise n_0, or use more text for the second moments (mom2_n_samples)."


@dataclass(frozen=True)
class LyapLockSettings:
    """Of LyapLock."""

    n_0: float = setting(
        "How many tokens of ordinary text C stands for.", 1000.0, above=0, search=(50, 20_000)
    )
    alpha: float = setting(
        "α: PL may be so many times that of the first batch.", 60.0, above=0, search=(2, 200)
    )


@register_solver("lyaplock")
class LyapLock(StepSolver):
    """See above. State: ``C``, ``W_0``, ``S``, ``KV`` = Σ K_pᵀV_p; ``queue``, D and Z."""

    Settings = LyapLockSettings

    def start(self, prior: Prior) -> dict[str, Tensor]:
        """No history, an empty queue."""
        C = prior.second_moment()
        W_0 = prior.W_0.to(C)
        return {
            "C": C,
            "W_0": W_0,
            "S": torch.zeros_like(C),
            "KV": torch.zeros_like(W_0),
            "queue": C.new_zeros(2),
        }

    def step(self, K: Tensor, R: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """ΔW, the history with this batch, and the queue after it."""
        state, W, gram = self.state, self.weight.to(K), K.T @ K
        D, Z = state["queue"].tolist()
        root = (self.settings.alpha * D) ** 0.5
        anchor = (Z / root if D > 0 else 1.0) * self.settings.n_0 * state["C"]
        A = gram + state["S"] + anchor
        right = K.T @ R + anchor @ (state["W_0"] - W) + state["KV"] - state["S"] @ W
        change = torch.cholesky_solve(right, cholesky(A, f"Information of {self.name}", _CURE))
        moved = W + change - state["W_0"]
        harm = float((moved * (state["C"] @ moved)).sum())
        if D == 0:
            D, root = harm, (self.settings.alpha * harm) ** 0.5
            Z = root
        if D > 0:
            Z = max(Z + (harm - self.settings.alpha * D) / root, root)
        history = {"S": state["S"] + gram, "KV": state["KV"] + gram @ (W + change)}
        return change, {**state, **history, "queue": K.new_tensor([D, Z])}
