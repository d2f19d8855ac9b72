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
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rule import Rule
from easyedit_rls.solvers.watch import widest_dtype


@dataclass(frozen=True)
class LayerStart:
    """One layer before the first edit.

    Attributes:
        solution: the rule's state.
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
) -> dict[int, LayerStart]:
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
    return {layer: _start(hparams.rule, hparams, weights[layer], layer, terms[layer]) for layer in terms}


@dataclass(frozen=True)
class _Terms:
    """What the anchors say: ``K_0ᵀK_0``, E[kkᵀ], and where they say something else than W_0, ``K_0ᵀV_0`` and
    ‖V_0‖².
    """

    gram: Tensor | None = None
    moment: Tensor | None = None
    cross: Tensor | None = None
    energy: float | None = None


def _start(rule: Rule, hp: RLSEditHyperParams, W_0: Tensor, layer: int, terms: _Terms) -> LayerStart:
    """One layer before the first edit. What a rebuild needs of it stays in main memory."""
    is_wide = hp.memory == "gated" and layer == hp.layers[0]  # a gate is to go by it, to the last digit
    W = W_0.to(widest_dtype(W_0.device)) if is_wide else W_0
    solution = rule.begin(
        Prior(W, terms.gram, hp.lambda_reg, hp.mu_reg, terms.cross, terms.moment, f"layer {layer}")
    )
    packed = None if terms.gram is None else PackedSymmetric.from_dense(terms.gram.cpu())
    watch = None if solution.watch is None else solution.watch.to(torch.device("cpu"))
    W_p = W_0 if torch.equal(W_0.to(solution.weight), solution.weight) else solution.weight.clone()
    beginning = Beginning(packed, None, hp.lambda_reg, hp.mu_reg, W_p, watch)
    return LayerStart(solution, W_0, beginning, terms.energy)


def _anchor_terms(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hp: RLSEditHyperParams,
    weights: Mapping[int, Tensor],
    anchors: AnchorPairs | Sequence[str] | None,
    show_progress: bool | None,
) -> dict[int, _Terms]:
    """What the anchors say of each layer."""
    if anchors is None:
        if not hp.mom2_adjustment or hp.mu_reg == 0:
            return {layer: _Terms() for layer in weights}
        found = moments(model, tok, hp, show_progress=show_progress)
        means = {layer: found[layer].mean.to(W.device) for layer, W in weights.items()}
        return {layer: _Terms(_moment_gram(mean, hp), mean) for layer, mean in means.items()}
    pairs = anchors if isinstance(anchors, AnchorPairs) else anchor_pairs(model, tok, hp, anchors)
    return {layer: _pair_terms(pairs, layer, W) for layer, W in weights.items()}


def _moment_gram(mean: Tensor, hp: RLSEditHyperParams) -> Tensor:
    """``n_0 · E[kkᵀ] + nullspace_weight · (I − P)``, (d_k, d_k), P the null space of E[kkᵀ]."""
    gram = mean * hp.mom2_update_weight
    if hp.nullspace_weight == 0:
        return gram
    eigenvalues, vectors = torch.linalg.eigh(mean.double())
    ordinary = vectors[:, eigenvalues >= hp.nullspace_threshold]
    return gram.double().add_(ordinary @ ordinary.T, alpha=hp.nullspace_weight)


def _pair_terms(pairs: AnchorPairs, layer: int, W: Tensor) -> _Terms:
    """What explicit anchors say."""
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
        return _Terms(K_0.T @ K_0, K_0.T @ K_0 / len(K_0))
    V_0 = pairs.values[layer].to(W)
    if V_0.shape != (K_0.shape[0], d_v):
        raise AnchorError(
            f"Anchor values of layer {layer} have shape {tuple(V_0.shape)}, "
            f"but {(K_0.shape[0], d_v)} is needed, one row a key."
        )
    return _Terms(K_0.T @ K_0, None, K_0.T @ V_0, float(V_0.double().square().sum()))
