"""RLSEdit's objective after t batches, one layer's three terms (arXiv 2601.15686, eq. 7):

J_t(W) = Σ_{i≤t} ‖D_i^{1/2} (K_i W − V_i)‖²  +  λ² ‖W − W_0‖²  +  μ² ‖K_0 W − V_0‖²
         edits                                  deviation         anchors
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """The three terms, weights included.

    Attributes:
        edits: what the edits still miss.
        deviation: from the unedited weight.
        anchors: what has become of the anchors' outputs.
    """

    edits: float
    deviation: float
    anchors: float

    @property
    def total(self) -> float:
        """J_t(W)."""
        return self.edits + self.deviation + self.anchors


def objective(
    W: Tensor,
    W_0: Tensor,
    edits: Iterable[Sequence[Tensor]],
    gram: Tensor | None,
    lambda_reg: float,
    mu_reg: float,
    cross: Tensor | None = None,
    energy: float = 0.0,
) -> Terms:
    """The terms at a weight, computed in its dtype and on its device.

    >>> W_0, K, V, D = torch.zeros(2, 1), torch.eye(2), torch.ones(2, 1), torch.tensor([1.0, 3.0])
    >>> objective(W_0 + 0.5, W_0, [(K, V, D)], torch.eye(2), 2.0, 4.0)
    Terms(edits=1.0, deviation=2.0, anchors=8.0)

    Args:
        W: any weight, (d_k, d_v).
        W_0: the unedited one, (d_k, d_v).
        edits: K, V and D of each batch: (u, d_k), (u, d_v), (u,), or with a dimension more for templates.
        gram: K_0ᵀK_0, (d_k, d_k); None for no anchors.
        lambda_reg: λ.
        mu_reg: μ.
        cross: K_0ᵀV_0, (d_k, d_v), for anchors with values of their own; None for V_0 = K_0 W_0.
        energy: ‖V_0‖² of those.
    """
    missed = torch.zeros((), dtype=W.dtype, device=W.device)
    for edit in edits:
        K, V, D = (tensor.to(W) for tensor in edit)
        missed += (D[..., None] * (K @ W - V).square()).sum()
    change = W - W_0.to(W)
    anchors = 0.0
    if gram is not None:
        moved = change if cross is None else W
        anchors = float((moved * (gram.to(W) @ moved)).sum())
        if cross is not None:
            anchors += energy - 2 * float((W * cross.to(W)).sum())
    deviation = lambda_reg**2 * float(change.square().sum())
    return Terms(float(missed), deviation, mu_reg**2 * max(anchors, 0.0))
