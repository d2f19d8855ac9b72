"""The recursive least-squares solution of one edited layer (RLSEdit, arXiv 2601.15686).

Legend, one orientation throughout (rows are edits):

    W    (d_k, d_v)  weight: key -> output           W_0   the unedited weight
    K    (u, d_k)    keys of a batch of u edits      V     (u, d_v) their target outputs
    D    (u,)        importances (a diagonal)        C     (d_k, d_k) covariance, A^-1
    K_0, V_0         anchor mapping                  λ, μ  weights of the two soft constraints

After t batches W_t minimizes

    J_t(W) = Σ_i ‖D_i^½ (K_i W − V_i)‖² + λ²‖W − W_0‖² + μ²‖K_0 W − V_0‖²

and Woodbury's identity gives the step, whose cost does not depend on t:

    A_0 = λ²I + μ²K_0ᵀK_0      C_0 = A_0^-1
    F = C Kᵀ                   S = D^-1 + K F = L Lᵀ      G = F L^-T
    C ← C − G Gᵀ               W ← W + G L^-1 (V − K W)                 since C_t KᵀD = F S^-1

Edits leave the objective by the same step with negative weight:

    F = C Kᵀ                   D^-1 − K F = L Lᵀ          H = F L^-T
    C ← C + H Hᵀ               W ← W − H L^-1 (V − K W)

A solution is a value: a change makes a new one, and the one before stays what it was, bit for bit, until the
change after. So nothing has to be taken back when a change fails, and to roll one back is to go on from the
solution before. Both share C, which is held by half (`packed`): what the last two changes add to it, G or
H or both, is kept beside it until no solution in use can do without.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError, PrecisionError
from easyedit_rls.solvers.base import LayerSolver, part_of, register_solver
from easyedit_rls.solvers.packed import PackedSymmetric, Term
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.spd import cholesky, information_drift, innovation_factor, spd_inverse, symmetrize_
from easyedit_rls.solvers.watch import WeightWatch, probes, widest_dtype

# ε·r² of an edit, at most, is what its retraction loses to rounding: measured 0.1 to 2.8 at d_k of 64 to 1536
_LOST = 3.0
_RETRACTION = 1e-4  # of the edit: error of a retraction that is still made by a downdate
_DEFINITE = 1e-2  # relative error of C along a new key, from where on C could lose its definiteness


@dataclass(frozen=True)
class _Parts:
    """What a solution consists of.

    Attributes:
        C: covariance without the terms that are not in it yet; solutions of one stream share it.
        W: weight, (d_k, d_v).
        Z: probes, (d_k, p).
        Y: ``A Z``, (d_k, p), for the drift.
        watch: of the weight; None in states of earlier versions.
        n_edits: edits in it.
        settled: terms that C may take in, since every solution in use has them.
        previous: terms of the change before the last.
        last: terms of the last change.
        W_before: weight before the last change.
        spare: memory of a weight that no solution in use needs, for the next one to take.
    """

    C: PackedSymmetric
    W: Tensor
    Z: Tensor
    Y: Tensor
    watch: WeightWatch | None
    n_edits: int
    settled: tuple[Term, ...] = ()
    previous: tuple[Term, ...] = ()
    last: tuple[Term, ...] = ()
    W_before: Tensor | None = None
    spare: list[Tensor] = field(default_factory=list)

    def follow(self, same_change: bool) -> "_Parts":
        """Where a change begins: one that does not join the last makes the one before the last final."""
        if same_change:
            return self
        settled = tuple(term for term in (*self.settled, *self.previous) if not term.is_in)
        spare = [] if self.W_before is None else [self.W_before]
        return replace(self, settled=settled, previous=self.last, last=(), W_before=self.W, spare=spare)


@register_solver("rls")
class RecursiveLeastSquares(LayerSolver):
    """Running solution of one layer's regularized least-squares problem.

    Owns its tensors: nothing given to it is kept by reference, except that `weight` hands out the live tensor
    (read only, by convention). λ, μ and the anchors are the prior's; it has no settings of its own.

    Args:
        prior: of the layer; inverted in float64 where the device has it.

    Raises:
        NumericalError: ``A_0`` is not positive definite or not finite.
    """

    _parts: _Parts
    can_drift = True
    can_retract = True
    solves_objective = True

    def __init__(self, prior: Prior, settings: Any = None) -> None:
        A, C, W = prior.solve()
        W_0 = prior.W_0
        self.name = prior.name
        Z = probes(W_0)
        Y = (A @ Z.to(A)).to(W_0.dtype)
        self._parts = _Parts(
            PackedSymmetric.from_dense(C, W_0.dtype),
            W.to(W_0.dtype).clone(),
            Z,
            Y,
            WeightWatch.begin(C, W),
            0,
        )

    @classmethod
    def _of(cls, parts: _Parts, name: str) -> "RecursiveLeastSquares":
        solution = cls.__new__(cls)
        solution.name, solution._parts = name, parts
        return solution

    @classmethod
    def assemble(
        cls, C: Tensor, W: Tensor, A: Tensor, watch: WeightWatch | None, n_edits: int, name: str
    ) -> "RecursiveLeastSquares":
        """A solution from its parts; it owns W from then on.

        Args:
            C: covariance, (d_k, d_k), exactly symmetric, in any dtype; not kept.
            W: solution, (d_k, d_v); its dtype and device are those of the whole state.
            A: information matrix, (d_k, d_k), in any dtype; not kept.
            watch: of the weight.
            n_edits: edits that are in it.
            name: of the layer, for messages.
        """
        Z = probes(W)
        Y = (A @ Z.to(A)).to(W.dtype)
        return cls._of(
            _Parts(PackedSymmetric.from_dense(C, W.dtype), W.contiguous(), Z, Y, watch, n_edits), name
        )

    @property
    def weight(self) -> Tensor:
        """W_t, (d_k, d_v). Do not write to it; it is good until the change after the next."""
        return self._parts.W

    @property
    def n_edits(self) -> int:
        """Edits taken in and not retracted."""
        return self._parts.n_edits

    @property
    def watch(self) -> WeightWatch | None:
        """Of the weight; None in states of earlier versions."""
        return self._parts.watch

    def covariance(self) -> Tensor:
        """C_t as a new (d_k, d_k) tensor."""
        p = self._parts
        return p.C.to_dense((*p.settled, *p.previous, *p.last))

    def variances(self, X: Tensor) -> Tensor:
        """``xᵀ C_t x`` of each column of X, (d_k, p) -> (p,), without C as a whole."""
        X = X.to(self.weight)  # a layer that was summed anew is in float64
        return (self._times(X.T.contiguous(), self._parts).T * X).sum(0)

    def update(
        self,
        K: Tensor,
        V: Tensor,
        importance: Tensor | None = None,
        *,
        same_change: bool = False,
        factor: float | None = None,
    ) -> "RecursiveLeastSquares":
        """The solution with one batch of edits more; see `LayerSolver.update`.

        Raises:
            NumericalError: a non-finite input, or S not positive definite.
            PrecisionError: the edits settle a direction so firmly that C in this dtype could not hold it.
        """
        if factor not in (None, 1.0):
            raise NumericalError(
                f"The covariance of {self.name} can't forget (factor {factor}). Take solver: forgetting."
            )
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance, self.weight)
        parts = self._parts.follow(same_change)
        KC = self._times(K, parts)
        self._refuse_if_too_firm(K, KC, D)
        L = innovation_factor(K, KC.T, D)
        G = torch.linalg.solve_triangular(L, KC, upper=False).T.contiguous()  # F L^-T
        step = torch.linalg.solve_triangular(L, V - K @ self.weight, upper=False)  # L^-1 (V − K W)
        return self._changed(parts, Term(G, -1.0), step, (K, V, D), n_edits, same_change)

    def retract(
        self, K: Tensor, V: Tensor, importance: Tensor | None = None, *, same_change: bool = False
    ) -> "RecursiveLeastSquares":
        """The solution without some edits, as if they had never been made: ``W = argmin J`` without them.

        Args:
            K: keys that were given to `update`, (u, d_k) or (u, r, d_k).
            V: their target outputs, (u, d_v) or (u, r, d_v).
            importance: their importances, (u,) or (u, r); ones if None.
            same_change: see `update`.

        Raises:
            NumericalError: the edits are not in the state (``D^-1 − K C Kᵀ`` is far from positive definite).
            PrecisionError: they settle so much of the state that this dtype can't tell what would be left
                without them. The information that stays has to be summed anew, see `ledger.rebuild.rebuilt`.
        """
        n_edits = len(K)
        K, V, D = self._checked(K, V, importance, self.weight)
        parts = self._parts.follow(same_change)
        KC = self._times(K, parts)
        wide = widest_dtype(K.device)
        core = -symmetrize_(K.to(wide) @ KC.T.to(wide))
        core.diagonal().add_(
            D.to(core).reciprocal()
        )  # SPD exactly if the edits' information is contained in A
        self._refuse_if_all(core, D)
        L = cholesky(core, f"Retraction core of {self.name}").to(KC)
        H = torch.linalg.solve_triangular(L, KC, upper=False).T.contiguous()
        step = torch.linalg.solve_triangular(L, V - K @ self.weight, upper=False)
        return self._changed(parts, Term(H, 1.0), step, (K, V, -D), -n_edits, same_change)

    def adopt(self, W: Tensor, *, same_change: bool = False) -> "RecursiveLeastSquares":
        """The same covariance with a weight that somebody else wrote, (d_k, d_v)."""
        parts = self._parts.follow(same_change)
        W = W.to(self.weight, copy=True)
        return self._of(
            replace(parts, W=W, watch=None if parts.watch is None else parts.watch.adopted(W)), self.name
        )

    def information(self) -> Tensor:
        """A_t, (d_k, d_k), from C as it is held; float64 where the device has it. Costs an inversion."""
        C = self.covariance().to(widest_dtype(self.weight.device))
        return spd_inverse(C, f"Covariance of {self.name}", "Raise lambda_reg or mu_reg.")

    def drift(self) -> float:
        """Relative error of C as the inverse of A, seen through fixed random probes (see
        `spd.information_drift`).
        """
        return self._drift

    @cached_property
    def _drift(self) -> float:
        p = self._parts
        out = p.C.update_(p.settled, p.Y.T)
        for term in (*p.previous, *p.last):
            if not term.is_in:
                out = torch.addmm(out, p.Y.T @ term.G, term.G.T, alpha=term.sign)
        return information_drift(out.T, p.Z)

    def weight_error(self) -> float:
        """What W lacks of the least-squares solution, as a share of the edit, or more (`watch`); 0 where it
        is not watched.
        """
        return self._weight_error

    @cached_property
    def _weight_error(self) -> float:
        return 0.0 if self._parts.watch is None or self.n_edits == 0 else self._parts.watch.error(self.weight)

    def tensors(self, before: LayerSolver | None = None) -> dict[str, Tensor]:
        """The solution as tensors that `from_tensors` takes; C is stored by half.

        Args:
            before: the solution that a roll-back goes to, to be stored with it; None for none.
        """
        p = self._parts
        if not isinstance(before, RecursiveLeastSquares):
            return {"C": p.C.to_vector((*p.settled, *p.previous, *p.last)), **_plain(p)}
        if before._parts.C is not p.C:  # the solution was rebuilt
            other = {
                name: tensor for name, tensor in before.tensors().items() if name not in WeightWatch.FIXED
            }
            return {**self.tensors(), **{f"before.{name}": tensor for name, tensor in other.items()}}
        last = () if before is self else p.last  # a change may leave a layer as it is
        standing = (*p.settled, *p.previous, *(p.last if before is self else ()))
        stored = {"C": p.C.to_vector(standing), **_plain(before._parts)}
        pending = {name: t for name, t in _plain(p).items() if name not in WeightWatch.FIXED}
        stored |= {f"pending.{name}": t.clone() if before is self else t for name, t in pending.items()}
        for i, term in enumerate(last):
            stored[f"pending.{'plus' if term.sign > 0 else 'minus'}.{i}"] = term.G
        return stored

    @classmethod
    def from_tensors(
        cls, stored: Mapping[str, Tensor], name: str, settings: Any = None
    ) -> tuple["RecursiveLeastSquares", "RecursiveLeastSquares | None"]:
        """See `LayerSolver.from_tensors`."""
        C = PackedSymmetric.from_vector(stored["C"], len(stored["W"]))
        fixed = {name: stored[name] for name in WeightWatch.FIXED if name in stored}
        pending, earlier = part_of(stored, "pending."), part_of(stored, "before.")
        base = cls._of(_from_plain(C, stored), name)
        if not pending:
            return base, cls.from_tensors({**fixed, **earlier}, name)[0] if earlier else None
        terms = sorted(
            (int(key.rsplit(".", 1)[1]), key) for key in pending if key.startswith(("plus.", "minus."))
        )
        last = tuple(Term(pending[key], 1.0 if key.startswith("plus") else -1.0) for _, key in terms)
        return cls._of(
            replace(_from_plain(C, {**fixed, **pending}), last=last, W_before=base.weight), name
        ), base

    def _times(self, X: Tensor, parts: _Parts) -> Tensor:
        """``X C``, (m, d_k); what is settled is brought into C on the way, in the same pass."""
        return parts.C.update_(parts.settled, X, (*parts.previous, *parts.last))

    def _refuse_if_too_firm(self, K: Tensor, KC: Tensor, D: Tensor) -> None:
        r = float((D * (KC * K).sum(1)).max())
        if _LOST * torch.finfo(K.dtype).eps * r > _DEFINITE and K.dtype != widest_dtype(K.device):
            raise PrecisionError(
                f"An edit of {self.name} would be {r:.1e} times as firm as all that is known of its key, "
                f"too much for {K.dtype}. Lower its importance, or raise mom2_update_weight or lambda_reg."
            )

    def _refuse_if_all(self, core: Tensor, D: Tensor) -> None:
        """Refuse to take out what is not there, or so much that rounding would decide what is left."""
        root = D.to(core).sqrt()
        left = float(
            torch.linalg.eigvalsh(root[:, None] * core * root).min()
        )  # 1/(1 + r) where r is what the edits weigh
        if left <= (_LOST * torch.finfo(self.weight.dtype).eps / _RETRACTION) ** 0.5:
            raise PrecisionError(
                f"Either these edits are not part of the state of {self.name}, "
                "or they are nearly all that it knows of their keys: without "
                f"them {left:.1e} of it would be left, too little for {self.weight.dtype}. "
                "Give those that were made, or sum those that stay anew."
            )

    def _changed(
        self,
        parts: _Parts,
        term: Term,
        step: Tensor,
        edits: tuple[Tensor, Tensor, Tensor],
        n_edits: int,
        same_change: bool,
    ) -> "RecursiveLeastSquares":
        """With ``W ← W − sign · G step``, in the memory of the weight before the last, if there is one."""
        K, V, D = edits
        out = (
            self._parts.spare.pop()
            if self._parts.spare and not same_change
            else torch.empty_like(self.weight)
        )
        W = torch.addmm(self.weight, term.G, step, alpha=-term.sign, out=out)
        if not bool(torch.isfinite(W.sum())):  # one number holds every NaN and infinity
            raise NumericalError(
                f"The new weight of {self.name} holds NaN or infinite entries. Raise lambda_reg or mu_reg."
            )
        Y = torch.addmm(parts.Y, K.T, D[:, None] * (K @ parts.Z))
        watch = None if parts.watch is None else parts.watch.after(K, V, D)
        new = replace(parts, W=W, Y=Y, watch=watch, n_edits=self.n_edits + n_edits, last=(*parts.last, term))
        return self._of(new, self.name)


def _plain(parts: _Parts) -> dict[str, Tensor]:
    """All but the covariance."""
    watch = {} if parts.watch is None else parts.watch.tensors()
    return {"W": parts.W, "Y": parts.Y, "n_edits": torch.tensor([parts.n_edits]), **watch}


def _from_plain(C: PackedSymmetric, stored: Mapping[str, Tensor]) -> _Parts:
    return _Parts(
        C,
        stored["W"],
        probes(stored["W"]),
        stored["Y"],
        WeightWatch.from_tensors(stored),
        int(stored["n_edits"]),
    )
