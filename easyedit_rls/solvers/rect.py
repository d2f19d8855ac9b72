"""RECT's filter (Gu et al. 2024, arXiv 2401.04700): of a step, only the entries that change most for
their size.

    post(ΔW)_ij = ΔW_ij  where |ΔW_ij / W_ij| is among the largest `share` of all entries, else 0
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.filtered import Filter, register_filter


@dataclass(frozen=True)
class RectSettings:
    """Of RECT's filter."""

    share: float = setting(
        "Share of the entries that change; the paper has 0.2 to 0.4.", 0.4, above=0, most=1, search=(0.1, 0.9)
    )


@register_filter("rect")
class Rect(Filter):
    """See above."""

    Settings = RectSettings

    def __call__(self, step: Tensor, W: Tensor, W_0: Tensor) -> Tensor:
        """The largest relative changes."""
        ratio = (step / W).abs().nan_to_num(nan=0.0).flatten()  # 0/0: no change
        kept = torch.zeros_like(ratio, dtype=torch.bool)
        kept[ratio.topk(max(1, round(len(ratio) * self.settings.share))).indices] = True
        return torch.where(kept.view_as(step), step, 0)
