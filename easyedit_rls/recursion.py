"""The recursive least-squares solution of one edited layer (RLSEdit, arXiv 2601.15686).

Legend, one orientation throughout (rows are edits):

    W    (d_k, d_v)  weight: key -> output           W_0   the unedited weight
    K    (u, d_k)    keys of a batch of u edits      V     (u, d_v) their target outputs
    D    (u,)        importances (a diagonal)        C     (d_k, d_k) covariance, A^-1
    K_0, V_0         anchor mapping                  λ, μ  weights of the two soft constraints

After t batches W_t minimises

    J_t(W) = Σ_i ‖D_i^½ (K_i W − V_i)‖² + λ²‖W − W_0‖² + μ²‖K_0 W − V_0‖²

and Woodbury's identity gives the step, whose cost does not depend on t:

    A_0 = λ²I + μ²K_0ᵀK_0      C_0 = A_0^-1
    F = C Kᵀ                   S = D^-1 + K F = L Lᵀ      G = F L^-T
    C ← C − G Gᵀ               W ← W + G L^-1 (V − K W)                 since C_t KᵀD = F S^-1

The last batch's downdate G stays *pending* until the next batch comes. So the last batch can be taken back bit for bit, without a
second (d_k, d_k) matrix: drop G.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError, StateMismatchError
from easyedit_rls.linalg import information_drift, innovation_factor, spd_inverse, symmetrize_

N_PROBES = 8


@dataclass(frozen=True)
class _Pending:
    """What the last batch changes, not yet folded into the committed state."""

    G: Tensor  # shape: (d_k, u)
    W: Tensor  # shape: (d_k, d_v)
    Y: Tensor  # shape: (d_k, p)
    n_edits: int


class RecursiveLeastSquares:
    """Running solution of one layer's regularised least-squares problem.

    Owns its tensors: nothing given to it is kept by reference, except that `weight` hands out the live tensor (read only, by
    convention).

    Args:
        W_0: unedited weight, (d_k, d_v), float32 or float64; its dtype and device are those of the whole state.
        gram: ``K_0ᵀK_0``, (d_k, d_k), or None for no anchor term. Inverted in float64 where the device has it.
        lambda_reg: λ ≥ 0, weight of the pull toward W_0.
        mu_reg: μ ≥ 0, weight of the pull toward the anchor mapping.
        anchor_cross: ``K_0ᵀV_0``, (d_k, d_v), for anchors that say something else than W_0 does; None means V_0 = K_0 W_0.
        name: of the layer, for messages.

    Raises:
        NumericalError: ``A_0`` is not positive definite or not finite.
    """

    def __init__(
        self,
        W_0: Tensor,
        gram: Tensor | None,
        *,
        lambda_reg: float,
        mu_reg: float,
        anchor_cross: Tensor | None = None,
        name: str = "layer",
    ) -> None:
        d_k = W_0.shape[0]
        wide = _widest_dtype(W_0.device)
        A = torch.zeros(d_k, d_k, dtype=wide, device=W_0.device)
        if gram is not None:
            A.add_(gram.to(A), alpha=mu_reg**2)
        A.diagonal().add_(lambda_reg**2)
        C = spd_inverse(
            A,
            f"Prior of {name} (d_k={d_k}, lambda_reg={lambda_reg:g}, mu_reg={mu_reg:g})",
            "Raise lambda_reg, or use more text for the second moments (mom2_n_samples).",
        )
        W = W_0.to(wide)
        if anchor_cross is not None:
            W = C @ (W * lambda_reg**2 + anchor_cross.to(A) * mu_reg**2)

        self.name = name
        self._n_edits = 0
        self._C = C.to(W_0.dtype)
        self._W = W.to(W_0.dtype).clone()
        generator = torch.Generator().manual_seed(0)  # fixed: two states of the same stream are comparable
        self._Z = torch.randn(d_k, N_PROBES, generator=generator, dtype=torch.float64).to(W_0)
        self._Y = (A @ self._Z.to(wide)).to(W_0.dtype)
        self._pending: _Pending | None = None

    @property
    def weight(self) -> Tensor:
        """Current solution W_t, (d_k, d_v); do not write to it."""
        return self._W if self._pending is None else self._pending.W

    @property
    def n_edits(self) -> int:
        """Edits taken in so far."""
        return self._n_edits if self._pending is None else self._pending.n_edits

    def covariance(self) -> Tensor:
        """C_t as a new (d_k, d_k) tensor."""
        C = self._C.clone()
        if self._pending is not None:
            _downdate_(C, self._pending.G)
        return C

    def update(self, K: Tensor, V: Tensor, importance: Tensor | None = None) -> None:
        """Take in one batch of edits. Until the next call, `rollback` undoes it exactly.

        Args:
            K: keys, (u, d_k).
            V: target outputs, (u, d_v).
            importance: diagonal of D, (u,), positive; ones if None.

        Raises:
            NumericalError: a non-finite input, or S not positive definite. The state is then as before.
        """
        K, V = K.to(self._C), V.to(self._C)
        D = torch.ones(K.shape[0]).to(self._C) if importance is None else importance.to(self._C)
        for label, tensor in (("Keys", K), ("Target outputs", V), ("Importances", D)):
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"{label} of {self.name} hold NaN or infinite entries. Check the model's weights for NaN.")

        self._fold()
        W, Y, n = self._W, self._Y, self._n_edits
        F = self._C @ K.T
        L = innovation_factor(K, F, D)
        G = torch.linalg.solve_triangular(L, F.T, upper=False).T  # F L^-T
        step = torch.linalg.solve_triangular(L, V - K @ W, upper=False)  # L^-1 (V − K W)
        W_new = torch.addmm(W, G, step)
        if not bool(torch.isfinite(W_new).all()):
            raise NumericalError(f"The new weight of {self.name} holds NaN or infinite entries. Raise lambda_reg or mu_reg.")
        self._pending = _Pending(G=G, W=W_new, Y=torch.addmm(Y, K.T, D[:, None] * (K @ self._Z)), n_edits=n + K.shape[0])

    def rollback(self) -> None:
        """Take the last batch back: weight and covariance are bit for bit those before it.

        Raises:
            StateMismatchError: there is no batch, or it was taken back already.
        """
        if self._pending is None:
            raise StateMismatchError(f"No batch of {self.name} can be rolled back: only the last one can, and only once.")
        self._pending = None

    def retract(self, K: Tensor, V: Tensor, importance: Tensor | None = None) -> None:
        """Remove edits from the objective exactly, as if they had never been made: ``W = argmin J`` without them.

        A downdate with negative weight, ``C' = C + F (D^-1 − K F)^-1 Fᵀ``, ``W' = W − C' KᵀD (V − K W)``.

        Args:
            K: keys that were given to `update`, (u, d_k).
            V: their target outputs, (u, d_v).
            importance: their importances, (u,); ones if None.

        Raises:
            NumericalError: the edits are not in the state (``D^-1 − K C Kᵀ`` is not positive definite).
        """
        K, V = K.to(self._C), V.to(self._C)
        D = torch.ones(K.shape[0]).to(self._C) if importance is None else importance.to(self._C)
        C = self.covariance()
        F = C @ K.T
        # D^-1 − K F is SPD exactly if the edits' information is contained in A
        core = symmetrize_(-(K @ F))
        core.diagonal().add_(D.reciprocal())
        middle = spd_inverse(core, f"Retraction core of {self.name}", "These edits are not part of the state: give those that were made.")
        C_new = symmetrize_(torch.addmm(C, F @ middle, F.T))
        W_new = self.weight - C_new @ (K.T @ (D[:, None] * (V - K @ self.weight)))
        Y = self._Y if self._pending is None else self._pending.Y
        Y_new = Y - K.T @ (D[:, None] * (K @ self._Z))
        n_edits = self.n_edits - K.shape[0]
        self._C, self._W, self._Y, self._n_edits, self._pending = C_new, W_new, Y_new, n_edits, None

    def adopt(self, W: Tensor) -> None:
        """Go on from a weight that somebody else wrote, (d_k, d_v), keeping the covariance. The last batch becomes final."""
        self._fold()
        self._W = W.to(self._W, copy=True)

    def drift(self) -> float:
        """Relative error of C as the inverse of A, seen through fixed random probes (see `linalg.information_drift`)."""
        if self._pending is None:
            return information_drift(self._C @ self._Y, self._Z)
        Y, G = self._pending.Y, self._pending.G
        return information_drift(self._C @ Y - G @ (G.T @ Y), self._Z)

    def _fold(self) -> None:
        """Make the pending batch permanent."""
        pending = self._pending
        if pending is None:
            return
        G, GT = pending.G, pending.G.T
        interrupt = None
        try:
            self._C.addmm_(G, GT, alpha=-1.0)
        except KeyboardInterrupt as exc:  # Python delivers the signal only after the in-place kernel has returned
            interrupt = exc
        self._W, self._Y, self._n_edits, self._pending = pending.W, pending.Y, pending.n_edits, None
        symmetrize_(self._C)
        if interrupt is not None:
            raise interrupt


def _downdate_(C: Tensor, G: Tensor) -> Tensor:
    """``C ← C − G Gᵀ`` in place, kept exactly symmetric."""
    C.addmm_(G, G.T, alpha=-1.0)
    return symmetrize_(C)


def _widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
