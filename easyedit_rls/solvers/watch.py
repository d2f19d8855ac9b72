"""How far a weight is from the least-squares solution, seen through fixed random probes: without A, and
without the edits.

Letters as in `solvers.rls`. With p probes U, (d_k, p), and Z = C_0 U, three small things are carried along in
float64:

    Y = A_t Z        R = Zᵀ B_t, B_t = A_0 W_p + Σ KᵀD V        both are sums over the edits

The solution has A_t W = B_t, so R − YᵀW = Uᵀ C_0 A_t (W_t − W). C_0 A_t = I + C_0 Σ KᵀDK has no eigenvalue
below 1: what is seen is what the weight lacks, or more where edits have settled a direction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

N_PROBES = 8
_ROWS = 512  # of W that are in float64 at once


@dataclass(frozen=True)
class WeightWatch:
    """See above. All tensors are float64 where the device has it.

    Attributes:
        Z: (d_k, p).
        Y: (d_k, p).
        R: (p, d_v).
        start: ``Uᵀ W_p``, (p, d_v), for the size of what was edited.
        U: (d_k, p).
    """

    Z: Tensor
    Y: Tensor
    R: Tensor
    start: Tensor
    U: Tensor

    FIXED: ClassVar = ("watch.Z", "watch.start")  # tensors that no edit changes

    @classmethod
    def begin(cls, C_0: Tensor, W_p: Tensor) -> "WeightWatch":
        """Before the first edit; both in the widest dtype."""
        U = probes(C_0)
        return cls(C_0 @ U, U.clone(), U.T @ W_p, U.T @ W_p, U)

    def after(self, K: Tensor, V: Tensor, D: Tensor) -> "WeightWatch":
        """With edits more, or less where D is negative: K (u, d_k), V (u, d_v), D (u,)."""
        K, V, D = K.to(self.Z), V.to(self.Z), D.to(self.Z)
        DKZ = D[:, None] * (K @ self.Z)
        return replace(self, Y=self.Y + K.T @ DKZ, R=self.R + DKZ.T @ V)

    def to(self, device: torch.device) -> "WeightWatch":
        """On another device."""
        wide = widest_dtype(device)
        return WeightWatch(
            *(tensor.to(device, wide) for tensor in (self.Z, self.Y, self.R, self.start, self.U))
        )

    def adopted(self, W: Tensor) -> "WeightWatch":
        """With a weight that somebody else wrote, (d_k, d_v), as the solution so far."""
        return replace(self, R=self._times(self.Y, W))

    def rebuilt(self, A: Tensor, W: Tensor) -> "WeightWatch":
        """With an exact information matrix, (d_k, d_k), and an exact solution, (d_k, d_v)."""
        Y = A.to(self.Z) @ self.Z
        return replace(self, Y=Y, R=self._times(Y, W))

    def error(self, W: Tensor) -> float:
        """``‖R − YᵀW‖ / ‖Uᵀ(W − W_p)‖``: what W, (d_k, d_v), lacks of the solution, as a share of the whole
        edit.
        """
        missing = float((self.R - self._times(self.Y, W)).norm())
        return missing / max(
            float((self._times(self.U, W) - self.start).norm()), torch.finfo(torch.float32).tiny
        )

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {"watch.Z": self.Z, "watch.Y": self.Y, "watch.R": self.R, "watch.start": self.start}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> "WeightWatch | None":
        """What `tensors` gave; None if the file was written by a version that had no watch."""
        if "watch.Y" not in stored:
            return None
        Z, Y, R, start = (stored[f"watch.{name}"] for name in ("Z", "Y", "R", "start"))
        return cls(Z, Y, R, start, probes(Z))

    def _times(self, left: Tensor, W: Tensor) -> Tensor:
        """``leftᵀ W``, (p, d_v), without a copy of W in float64."""
        out = torch.zeros_like(self.start)
        for i in range(0, len(W), _ROWS):
            out.addmm_(left[i : i + _ROWS].T, W[i : i + _ROWS].to(self.Z))
        return out


def probes(like: Tensor) -> Tensor:
    """Fixed random probes, (d_k, p), so that two states of the same stream are comparable."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(like), N_PROBES, generator=generator, dtype=torch.float64).to(like)


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
