"""The batch solution: one layer's least-squares problem with all its edits at once.

    A = A_0 + Σ K_iᵀ D_i K_i                 W = W_p + A^-1 Σ K_iᵀ D_i (V_i − K_i W_p)

with A_0 = λ²I + μ² K_0ᵀK_0 and W_p the weight that the soft constraints alone give: what the recursion has to
equal (arXiv 2601.15686). Summed in float64.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls.solvers.base import flat_rows
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.prior import information
from easyedit_rls.solvers.spd import spd_inverse
from easyedit_rls.solvers.watch import WeightWatch, widest_dtype


@dataclass(frozen=True)
class Beginning:
    """One layer's problem before the first edit, so that A_0 can be had again.

    Attributes:
        gram: ``K_0ᵀK_0`` by half, or None for no anchor term. In states of earlier versions None, with `C_0`
            instead.
        C_0: the covariance before the first edit by half, where nothing else is known.
        lambda_reg: λ.
        mu_reg: μ.
        W_p: the weight that the soft constraints alone give, (d_k, d_v).
        watch: of the weight, before the first edit.
    """

    gram: PackedSymmetric | None
    C_0: PackedSymmetric | None
    lambda_reg: float
    mu_reg: float
    W_p: Tensor
    watch: WeightWatch | None

    def information(self, device: torch.device) -> Tensor:
        """A_0, (d_k, d_k), in the widest dtype of the device."""
        wide = widest_dtype(device)
        if self.C_0 is not None:
            return spd_inverse(self.C_0.to_dense().to(device, wide), "Prior covariance", "Mend the ledger.")
        gram = None if self.gram is None else self.gram.to_dense().to(device)
        return information(len(self.W_p), gram, self.lambda_reg, self.mu_reg, device)


def batch_solution(
    beginning: Beginning, edits: Iterable[Sequence[Tensor]], layer: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """A, C and W of the batch problem; float64 where the device has it.

    Args:
        beginning: the problem before the first edit.
        edits: K, V and D of each batch: (u, d_k), (u, d_v), (u,), or with rows for each template.
        layer: its number, for messages.
        device: to compute on.

    Raises:
        NumericalError: A is not positive definite.
    """
    A = beginning.information(device)
    W_p = beginning.W_p.to(A)
    right = torch.zeros_like(W_p)
    for edit in edits:
        K, V, D = flat_rows(*(tensor.to(A) for tensor in edit))
        A.addmm_(K.T, D[:, None] * K)
        right.addmm_(K.T, D[:, None] * (V - K @ W_p))
    C = spd_inverse(A, f"Information matrix of layer {layer}", "Raise lambda_reg.")
    return A, C, W_p + C @ right
