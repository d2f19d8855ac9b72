"""PRUNE's filter (Ma et al. 2024, arXiv 2405.16821): no direction of the whole change outgrows the
unedited weight.

    s ← log_b s − log_b s_0 + s_0          for singular values s of W − W_0 above s_0 = σ_max(W_0)

The paper does so once, behind the last edit. A stream has no last batch, so it is done behind each; what was
restrained once and grows again is restrained again.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.filtered import Filter, register_filter


@dataclass(frozen=True)
class PruneSettings:
    """Of PRUNE's filter."""

    base: float = setting("b, the logarithm's base.", 1.2, above=1, search=(1.05, 2.0))


@register_filter("prune")
class Prune(Filter):
    """See above."""

    Settings = PruneSettings

    def __call__(self, step: Tensor, W: Tensor, W_0: Tensor) -> Tensor:
        """The step to the restrained change."""
        limit = torch.linalg.matrix_norm(W_0, 2)
        U, sizes, Vh = torch.linalg.svd(W + step - W_0, full_matrices=False)
        if not bool((sizes > limit).any()):
            return step
        restrained = (sizes / limit).clamp(min=1).log() / math.log(self.settings.base) + limit
        sizes = torch.where(sizes > limit, restrained, sizes)
        kept: Tensor = W_0 + (U * sizes) @ Vh - W
        return kept
