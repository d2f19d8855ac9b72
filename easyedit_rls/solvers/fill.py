"""How full a layer's memory is:

    fill = 1 − tr(C_t A_0)/d_k        0 before the first edit, towards 1 as edits settle every direction

tr(C_t A_0)/d_k is the mean, over all directions, of the share of the prior's variance that is left: with
A_0 = L Lᵀ it is the mean eigenvalue of Lᵀ C_t L, which is I at the start. `Gauge` estimates it in p·d_k²
operations by Hutchinson's estimator: E[xᵀ C_t x] with x = L z, z of random signs. Its standard deviation is
below √(2/(p·d_k)): 0.009 at d_k 1,536, 0.003 at 14,336.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.batch import Beginning
from easyedit_rls.solvers.spd import cholesky
from easyedit_rls.solvers.watch import widest_dtype

_PROBES = 16


def exact_fill(solution: LayerSolver, beginning: Beginning) -> float | None:
    """``1 − tr(C_t A_0)/d_k`` in the widest dtype of the device; None for a rule that has no such A_0
    (`solves_objective`).
    """
    if not solution.solves_objective:
        return None
    A_0 = beginning.information(solution.weight.device)
    left = (solution.covariance().to(A_0) * A_0).sum()  # both are symmetric
    return 1 - float(left) / len(A_0)


class Gauge:
    """Estimates the fill of the layers of one stream after each batch; draws its probes at the first look."""

    def __init__(self) -> None:
        self._stream: object = None
        self._probes: dict[int, Tensor] = {}

    def read(
        self,
        solution: LayerSolver,
        beginnings: Mapping[int, Beginning],
        layer: int,
        stream: object = None,
    ) -> float | None:
        """Fill of one layer; None for a rule that has no such A_0 (`solves_objective`).

        Args:
            solution: its state now.
            beginnings: of all layers.
            layer: its number.
            stream: what another stream has another one of; None for the beginnings.
        """
        if not solution.solves_objective:
            return None
        stream = beginnings if stream is None else stream
        if stream is not self._stream:
            self._stream, self._probes = stream, {}
        if layer not in self._probes:
            self._probes[layer] = _drawn(beginnings[layer], solution.weight)
        X = self._probes[layer]
        return 1 - float(solution.variances(X).double().mean()) / len(X)


def _drawn(beginning: Beginning, like: Tensor) -> Tensor:
    """Probes x = L z, (d_k, p), so that E[x xᵀ] = A_0 and, before the first edit, xᵀ C_0 x = d_k."""
    L = cholesky(beginning.information(like.device), "Prior")
    signs = torch.Generator().manual_seed(0)
    Z = torch.randint(0, 2, (len(L), _PROBES), generator=signs, dtype=torch.float64) * 2 - 1
    X: Tensor = L @ Z.to(L.device, widest_dtype(L.device))
    return X.to(like)
