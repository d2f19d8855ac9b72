"""The state of each edited layer before the first edit: the pre-trained weight, and the two soft
constraints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.cache import moments
from easyedit_rls.anchors.pairs import AnchorPairs, anchor_pairs
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import AnchorError
from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.batch import Beginning
from easyedit_rls.solvers.forgetting import ForgettingLeastSquares
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.rls import RecursiveLeastSquares


@dataclass(frozen=True)
class Prior:
    """One layer before the first edit.

    Attributes:
        solution: the state.
        unedited: W_0, (d_k, d_v), float32; the solution's weight unless anchors say something else.
        beginning: what is needed to sum the problem anew.
        anchor_energy: ‖V_0‖², for anchors with values of their own; None for V_0 = K_0 W_0.
    """

    solution: LayerSolver
    unedited: Tensor
    beginning: Beginning
    anchor_energy: float | None


def make_priors(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    weights: Mapping[int, Tensor],
    anchors: AnchorPairs | Sequence[str] | None,
    show_progress: bool | None,
) -> dict[int, Prior]:
    """Make the state of every edited layer before the first edit.

    Args:
        model: unedited.
        tok: its tokenizer.
        hparams: regularizers, and where the second moments come from.
        weights: layer -> W_0, (d_k, d_v), float32.
        anchors: explicit anchors, or None for second moments.
        show_progress: None shows progress bars on a terminal only.

    Raises:
        AnchorError: the second moments can't be had, or anchors don't fit.
        NumericalError: a prior is not positive definite.
    """
    terms = _anchor_terms(model, tok, hparams, weights, anchors, show_progress)
    return {layer: _prior(hparams, weights[layer], f"layer {layer}", *terms[layer]) for layer in terms}


def _prior(
    hp: RLSEditHyperParams,
    W_0: Tensor,
    name: str,
    gram: Tensor | None,
    cross: Tensor | None,
    energy: float | None,
) -> Prior:
    """One layer before the first edit. What a rebuild needs of it stays in main memory."""
    solution = _new_solution(hp, W_0, gram, cross, name)
    packed = None if gram is None else PackedSymmetric.from_dense(gram.cpu())
    watch = None if solution.watch is None else solution.watch.to(torch.device("cpu"))
    W_p = W_0 if torch.equal(W_0, solution.weight) else solution.weight.clone()
    return Prior(solution, W_0, Beginning(packed, None, hp.lambda_reg, hp.mu_reg, W_p, watch), energy)


def _anchor_terms(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hp: RLSEditHyperParams,
    weights: Mapping[int, Tensor],
    anchors: AnchorPairs | Sequence[str] | None,
    show_progress: bool | None,
) -> dict[int, tuple[Tensor | None, Tensor | None, float | None]]:
    """``K_0ᵀK_0`` of each layer, and ``K_0ᵀV_0`` and ‖V_0‖² where the anchors say something else than W_0."""
    if anchors is None:
        if not hp.mom2_adjustment or hp.mu_reg == 0:
            return {layer: (None, None, None) for layer in weights}
        found = moments(model, tok, hp, show_progress=show_progress)
        return {
            layer: (_moment_gram(found[layer].mean.to(W.device), hp), None, None)
            for layer, W in weights.items()
        }
    pairs = anchors if isinstance(anchors, AnchorPairs) else anchor_pairs(model, tok, hp, anchors)
    return {layer: _pair_terms(pairs, layer, W) for layer, W in weights.items()}


def _moment_gram(mean: Tensor, hp: RLSEditHyperParams) -> Tensor:
    """``n_0 · E[kkᵀ] + nullspace_weight · Π``, (d_k, d_k).

    Π projects on the eigenvectors of E[kkᵀ] with eigenvalues of at least `nullspace_threshold`: the
    directions that ordinary keys are made of. AlphaEdit (Fang et al. 2025, arXiv 2410.02355) forbids any
    change there, which is the limit of an infinite weight.
    """
    gram = mean * hp.mom2_update_weight
    if hp.nullspace_weight == 0:
        return gram
    eigenvalues, vectors = torch.linalg.eigh(mean.double())
    ordinary = vectors[:, eigenvalues >= hp.nullspace_threshold]
    return gram.double().add_(ordinary @ ordinary.T, alpha=hp.nullspace_weight)


def _new_solution(
    hp: RLSEditHyperParams, W_0: Tensor, gram: Tensor | None, cross: Tensor | None, name: str
) -> LayerSolver:
    """The state of one layer before the first edit."""
    if hp.forgetting_factor == 1:
        return RecursiveLeastSquares(
            W_0, gram, lambda_reg=hp.lambda_reg, mu_reg=hp.mu_reg, anchor_cross=cross, name=name
        )
    factor = None if hp.forgetting_factor == "adaptive" else float(hp.forgetting_factor)
    memory = hp.forgetting_memory
    return ForgettingLeastSquares(
        W_0,
        gram,
        lambda_reg=hp.lambda_reg,
        mu_reg=hp.mu_reg,
        anchor_cross=cross,
        factor=factor,
        memory=memory,
        name=name,
    )


def _pair_terms(pairs: AnchorPairs, layer: int, W: Tensor) -> tuple[Tensor, Tensor | None, float | None]:
    """``K_0ᵀK_0`` and, for anchors with values of their own, ``K_0ᵀV_0`` and ‖V_0‖²."""
    d_k, d_v = W.shape
    if layer not in pairs.keys:
        raise AnchorError(
            f"Anchor pairs have no keys for layer {layer}, "
            f"only for {sorted(pairs.keys)}. Give them for every edited layer."
        )
    K_0 = pairs.keys[layer].to(W)
    if K_0.dim() != 2 or K_0.shape[1] != d_k:
        raise AnchorError(
            f"Anchor keys of layer {layer} have shape {tuple(K_0.shape)}, "
            f"but (anchors, {d_k}) is needed. Collect them from this model."
        )
    if layer not in pairs.values:
        return K_0.T @ K_0, None, None
    V_0 = pairs.values[layer].to(W)
    if V_0.shape != (K_0.shape[0], d_v):
        raise AnchorError(
            f"Anchor values of layer {layer} have shape {tuple(V_0.shape)}, "
            f"but {(K_0.shape[0], d_v)} is needed, one row a key."
        )
    return K_0.T @ K_0, K_0.T @ V_0, float(V_0.double().square().sum())
