"""SPHERE's filter (EasyEdit's SPHERE): a step keeps off the weight's own main directions.

    post(ΔW) = (I − α U Uᵀ) ΔW

U (d_k, r): the top eigenvectors of the Gram matrix of the current weight, its columns scaled to length one
(each output's row of W in PyTorch's layout); as few as have more than `share` of the eigenvalues' sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.filtered import Filter, register_filter

_NOT_ZERO = 1e-8  # added to lengths, as published


@dataclass(frozen=True)
class SphereSettings:
    """Of SPHERE's filter."""

    alpha: float = setting("How much of the step along U goes.", 0.5, above=0, most=1, search=(0.1, 1.0))
    share: float = setting(
        "Share of the eigenvalues' sum that U stands for.", 0.5, above=0, most=1, search=(0.1, 1.0)
    )


@register_filter("sphere")
class Sphere(Filter):
    """See above."""

    Settings = SphereSettings

    def __call__(self, step: Tensor, W: Tensor, W_0: Tensor) -> Tensor:
        """(I − α U Uᵀ) ΔW."""
        unit = W / (W.norm(dim=0, keepdim=True) + _NOT_ZERO)
        eigenvalues, vectors = torch.linalg.eigh(unit @ unit.T / W.shape[1])
        sums = eigenvalues.flip(0).cumsum(0) / eigenvalues.sum()
        rank = min(int((sums <= self.settings.share).sum()) + 1, len(eigenvalues))
        U = vectors[:, -rank:]
        kept: Tensor = step - self.settings.alpha * (U @ (U.T @ step))
        return kept
