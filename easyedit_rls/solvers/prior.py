"""What a rule begins with: one layer's weight, and what ordinary text says of its keys.

    A_0 = λ²I + μ²K_0ᵀK_0          C_0 = A_0^-1          W_p = C_0 (λ²W_0 + μ²K_0ᵀV_0)

W_p is the weight that both soft constraints of RLSEdit (arXiv 2601.15686) alone give: W_0 itself, unless
anchors say something else than W_0 does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls.errors import AnchorError
from easyedit_rls.solvers.spd import spd_inverse
from easyedit_rls.solvers.watch import widest_dtype


@dataclass(frozen=True)
class Prior:
    """One layer before the first edit.

    Attributes:
        W_0: unedited weight, (d_k, d_v), float32 or float64; its dtype and device are those of the rule's
            weight.
        gram: ``K_0ᵀK_0``, (d_k, d_k), or None for no anchor term.
        lambda_reg: λ ≥ 0, weight of the pull toward W_0.
        mu_reg: μ ≥ 0, weight of the pull toward the anchor mapping.
        anchor_cross: ``K_0ᵀV_0``, (d_k, d_v), for anchors that say something else than W_0 does; None means
            V_0 = K_0 W_0.
        moment: ``E[kkᵀ]`` over ordinary text, (d_k, d_k), for rules that weigh it by an n_0 of their own;
            None where there is none.
        name: of the layer, for messages.
    """

    W_0: Tensor
    gram: Tensor | None = None
    lambda_reg: float = 0.0
    mu_reg: float = 1.0
    anchor_cross: Tensor | None = None
    moment: Tensor | None = None
    name: str = "layer"

    def second_moment(self) -> Tensor:
        """``E[kkᵀ]``, (d_k, d_k), in the widest dtype of the device.

        Raises:
            AnchorError: there is none, or the anchors are explicit pairs with values of their own.
        """
        if self.moment is None or self.anchor_cross is not None:
            raise AnchorError(
                f"The solver needs second moments of ordinary text for {self.name}, without anchor values. "
                "Set mom2_adjustment: true and mu_reg above 0, or take solver: rls."
            )
        return self.moment.to(widest_dtype(self.W_0.device))

    def information(self) -> Tensor:
        """``A_0``, (d_k, d_k), in the widest dtype of the device."""
        return information(len(self.W_0), self.gram, self.lambda_reg, self.mu_reg, self.W_0.device)

    def solve(self) -> tuple[Tensor, Tensor, Tensor]:
        """``A_0``, ``C_0`` and W_p, in the widest dtype of the device.

        Raises:
            NumericalError: ``A_0`` is not positive definite or not finite.
        """
        A = self.information()
        C = spd_inverse(
            A,
            f"Prior of {self.name} (d_k={len(A)}, lambda_reg={self.lambda_reg:g}, mu_reg={self.mu_reg:g})",
            "Raise lambda_reg, or use more text for the second moments (mom2_n_samples).",
        )
        W = self.W_0.to(A)
        if self.anchor_cross is not None:
            W = C @ (W * self.lambda_reg**2 + self.anchor_cross.to(A) * self.mu_reg**2)
        return A, C, W


def information(
    d_k: int, gram: Tensor | None, lambda_reg: float, mu_reg: float, device: torch.device
) -> Tensor:
    """``A_0 = λ²I + μ²K_0ᵀK_0``, (d_k, d_k), in the widest dtype of the device."""
    A = torch.zeros(d_k, d_k, dtype=widest_dtype(device), device=device)
    if gram is not None:
        A.add_(gram.to(A), alpha=mu_reg**2)
    A.diagonal().add_(lambda_reg**2)
    return A


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """The projection P on the eigenvectors of ``E[kkᵀ]``, (d_k, d_k), with eigenvalues below a threshold: the
    directions that ordinary keys hardly have (AlphaEdit, Fang et al. 2025, arXiv 2410.02355).

    I − P, the others, is what `nullspace_weight` weighs: the limit of an infinite weight is AlphaEdit's rule
    that nothing changes there.
    """
    eigenvalues, vectors = torch.linalg.eigh(moment)
    rare = vectors[:, eigenvalues < threshold]
    projection: Tensor = rare @ rare.T
    return projection
