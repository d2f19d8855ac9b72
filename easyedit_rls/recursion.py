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

Edits leave the objective by the same step with negative weight:

    F = C Kᵀ                   D^-1 − K F = L Lᵀ          H = F L^-T
    C ← C + H Hᵀ               W ← W − H L^-1 (V − K W)

What the last change adds to C, G or H or both, stays *pending* until the next change comes. So the last change can be taken back
bit for bit, without a second (d_k, d_k) matrix: drop it. It is brought into C in the same pass that makes the next batch's F.
C is held by half (`symmetric`), and F by its rows, Fᵀ = K C.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError
from easyedit_rls.interrupts import deferred_interrupts
from easyedit_rls.linalg import (
    cholesky,
    information_drift,
    innovation_factor,
    row_major,
    spd_inverse,
    symmetrize_,
)
from easyedit_rls.revertible import Revertible
from easyedit_rls.symmetric import PackedSymmetric

N_PROBES = 8


class _Term(NamedTuple):
    """One change of the covariance, ``C ← C + sign · G Gᵀ``."""

    G: Tensor  # shape: (d_k, u)
    sign: float


@dataclass(frozen=True)
class _Pending:
    """What the last change does, not yet folded into the committed state."""

    terms: tuple[_Term, ...]
    W: Tensor  # shape: (d_k, d_v)
    Y: Tensor  # shape: (d_k, p)
    n_edits: int


class RecursiveLeastSquares(Revertible[_Pending]):
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
        A, C, W = prior(W_0, gram, lambda_reg=lambda_reg, mu_reg=mu_reg, anchor_cross=anchor_cross, name=name)
        self._assemble(C, W.to(W_0.dtype).clone(), A, 0, name)

    def _assemble(self, C: Tensor, W: Tensor, A: Tensor, n_edits: int, name: str) -> None:
        self.name = name
        self._n_edits = n_edits
        self._C, self._W, self._Z = PackedSymmetric.of(C, W.dtype), W.contiguous(), probes(W)
        self._Y = (A @ self._Z.to(A)).to(W.dtype)
        self._pending = None
        self._unfolded: tuple[_Term, ...] = ()  # committed, but not yet in C
        self._spare: Tensor | None = None  # memory for the next weight

    @classmethod
    def assemble(cls, C: Tensor, W: Tensor, A: Tensor, n_edits: int, name: str) -> "RecursiveLeastSquares":
        """A state from its parts; it owns W from then on.

        Args:
            C: covariance, (d_k, d_k), exactly symmetric, in any dtype; not kept.
            W: solution, (d_k, d_v); its dtype and device are those of the whole state.
            A: information matrix, (d_k, d_k), in any dtype; not kept.
            n_edits: edits that are in it.
            name: of the layer, for messages.
        """
        state = cls.__new__(cls)
        state._assemble(C, W, A, n_edits, name)
        return state

    def covariance(self) -> Tensor:
        """C_t as a new (d_k, d_k) tensor."""
        C = self._C.clone()
        C.update_(self._terms())
        return C.full()

    def update(
        self, K: Tensor, V: Tensor, importance: Tensor | None = None, *, joins_last: bool = False, factor: float | None = None
    ) -> float:
        """Take in one batch of edits. Until the next change, `rollback` undoes it exactly.

        Args:
            K: keys, (u, d_k), or (u, r, d_k) where each edit has r rows of its own.
            V: target outputs, (u, d_v) or (u, r, d_v).
            importance: diagonal of D, (u,) or (u, r), positive; ones if None.
            joins_last: make it part of the change before, so that `rollback` undoes both.
            factor: 1 or None; only `ForgettingLeastSquares` can let older edits fade.

        Returns:
            1.0, the forgetting factor.

        Raises:
            NumericalError: a non-finite input, or S not positive definite. The state is then as before.
        """
        if factor not in (None, 1.0):
            raise NumericalError(f"The covariance of {self.name} can't forget (factor {factor}). Set forgetting_factor.")
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance)
        if not joins_last:
            self.commit()
        KC = self._times(K)
        L = innovation_factor(K, KC.T, D)
        G = torch.linalg.solve_triangular(L, KC, upper=False).T.contiguous()  # F L^-T
        step = torch.linalg.solve_triangular(L, V - K @ self.weight, upper=False)  # L^-1 (V − K W)
        self._add(_Term(G, -1.0), step, K, D, n_edits)
        return 1.0

    def retract(self, K: Tensor, V: Tensor, importance: Tensor | None = None, *, joins_last: bool = False) -> None:
        """Remove edits from the objective exactly, as if they had never been made: ``W = argmin J`` without them.

        Until the next change, `rollback` undoes it exactly.

        Args:
            K: keys that were given to `update`, (u, d_k) or (u, r, d_k).
            V: their target outputs, (u, d_v) or (u, r, d_v).
            importance: their importances, (u,) or (u, r); ones if None.
            joins_last: make it part of the change before, so that `rollback` undoes both.

        Raises:
            NumericalError: the edits are not in the state (``D^-1 − K C Kᵀ`` is not positive definite). The state is then as before.
        """
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance)
        if not joins_last:
            self.commit()
        KC = self._times(K)
        core = -symmetrize_(K.to(widest_dtype(K.device)) @ KC.T.to(widest_dtype(K.device)))
        core.diagonal().add_(D.to(core).reciprocal())  # SPD exactly if the edits' information is contained in A
        cure = "These edits are not part of the state: give those that were made."
        L = cholesky(core, f"Retraction core of {self.name}", cure).to(KC)
        H = torch.linalg.solve_triangular(L, KC, upper=False).T.contiguous()
        step = torch.linalg.solve_triangular(L, V - K @ self.weight, upper=False)
        self._add(_Term(H, 1.0), step, K, -D, -n_edits)

    def commit(self) -> None:
        """Make the last change permanent: `rollback` can't undo it any more. C itself is changed on the way through the next update."""
        pending = self._pending
        if pending is not None:
            self._spare = self._W
            self._W, self._Y, self._n_edits, self._pending = pending.W, pending.Y, pending.n_edits, None
            self._unfolded = (*self._unfolded, *pending.terms)

    def rollback(self) -> None:
        spare = None if self._pending is None else self._pending.W
        super().rollback()
        self._spare = spare

    def drift(self) -> float:
        """Relative error of C as the inverse of A, seen through fixed random probes (see `linalg.information_drift`)."""
        Y = self._Y if self._pending is None else self._pending.Y
        return information_drift(self._times(Y.T).T, self._Z)

    def tensors(self) -> dict[str, Tensor]:
        """The whole state as tensors that `from_tensors` takes, the pending change included; C is stored by half."""
        self._fold()
        stored = {"C": self._C.to_vector(), "W": self._W, "Y": self._Y, "Z": self._Z, "n_edits": torch.tensor([self._n_edits])}
        if self._pending is not None:
            stored |= {"pending.W": self._pending.W, "pending.Y": self._pending.Y, "pending.n_edits": torch.tensor([self._pending.n_edits])}
            for i, term in enumerate(self._pending.terms):
                stored[f"pending.{'plus' if term.sign > 0 else 'minus'}.{i}"] = term.G
        return stored

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], name: str) -> "RecursiveLeastSquares":
        """The state that `tensors` was taken from, bit for bit; owns what it is given.

        Args:
            stored: what `tensors` returned, all on one device.
            name: of the layer, for messages.
        """
        state = cls.__new__(cls)
        state.name = name
        state._W, state._Y, state._Z = stored["W"], stored["Y"], stored["Z"]
        state._C = PackedSymmetric.from_vector(stored["C"], len(state._W))
        state._n_edits = int(stored["n_edits"])
        state._pending, state._unfolded, state._spare = None, (), None
        if "pending.W" in stored:
            terms = sorted((int(key.rsplit(".", 1)[1]), key) for key in stored if key.startswith(("pending.plus", "pending.minus")))
            state._pending = _Pending(
                terms=tuple(_Term(stored[key], 1.0 if ".plus." in key else -1.0) for _, key in terms),
                W=stored["pending.W"],
                Y=stored["pending.Y"],
                n_edits=int(stored["pending.n_edits"]),
            )
        return state

    def _checked(self, K: Tensor, V: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs in the state's dtype and memory layout, a row each key."""
        K, V, D = flat_rows(K, V, torch.ones(K.shape[:-1]) if importance is None else importance)
        K, V, D = row_major(K, self._W), row_major(V, self._W), D.to(self._W)
        for label, tensor in (("Keys", K), ("Target outputs", V), ("Importances", D)):
            if not bool(torch.isfinite(tensor).all()):
                raise NumericalError(f"{label} of {self.name} hold NaN or infinite entries. Check the model's weights for NaN.")
        return K, V, D

    def _times(self, X: Tensor) -> Tensor:
        """``X C``, (m, d_k), with the pending change; what was committed is folded into C on the way, in the same pass."""
        with deferred_interrupts():
            out = self._C.update_(self._unfolded, X)
            self._unfolded = ()
        for G, sign in () if self._pending is None else self._pending.terms:
            out = torch.addmm(out, X @ G, G.T, alpha=sign)
        return out

    def _add(self, term: _Term, step: Tensor, K: Tensor, D: Tensor, n_edits: int) -> None:
        """Put ``W ← W − sign · G step`` into the pending change, in the memory of the weight before the last, if there is one."""
        out, self._spare = torch.empty_like(self._W) if self._spare is None else self._spare, None
        W = torch.addmm(self.weight, term.G, step, alpha=-term.sign, out=out)
        if not bool(torch.isfinite(W.sum())):  # one number holds every NaN and infinity
            raise NumericalError(f"The new weight of {self.name} holds NaN or infinite entries. Raise lambda_reg or mu_reg.")
        before = () if self._pending is None else self._pending.terms
        Y = self._Y if self._pending is None else self._pending.Y
        self._pending = _Pending((*before, term), W, torch.addmm(Y, K.T, D[:, None] * (K @ self._Z)), self.n_edits + n_edits)

    def _fold(self) -> None:
        """Bring what was committed into C."""
        with deferred_interrupts():
            self._C.update_(self._unfolded)
            self._unfolded = ()

    def _terms(self) -> tuple[_Term, ...]:
        """What is to be added to the stored C to give C_t."""
        return self._unfolded if self._pending is None else (*self._unfolded, *self._pending.terms)


def prior(
    W_0: Tensor, gram: Tensor | None, *, lambda_reg: float, mu_reg: float, anchor_cross: Tensor | None, name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``A_0``, ``C_0`` and the weight that both soft constraints alone give, in the widest dtype of the device.

    Raises:
        NumericalError: ``A_0`` is not positive definite or not finite.
    """
    d_k = W_0.shape[0]
    wide = widest_dtype(W_0.device)
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
    return A, C, W


def flat_rows(K: Tensor, V: Tensor, D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, target outputs and importances as (rows, d_k), (rows, d_v), (rows,), however many rows an edit has."""
    return K.flatten(0, -2), V.flatten(0, -2), D.flatten()


def probes(like: Tensor) -> Tensor:
    """Fixed random probes Z, (d_k, p), so that two states of the same stream are comparable."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(like), N_PROBES, generator=generator, dtype=torch.float64).to(like)


def widest_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 on devices that lack it (Apple's MPS)."""
    return torch.float32 if device.type == "mps" else torch.float64
