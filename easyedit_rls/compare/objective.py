"""The three terms of RLSEdit's objective at whatever weights an editor left: one yardstick for all."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.cache import moments
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.errors import LayoutError
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.weights import EditedWeight


class Objective:
    """``Σ_i d_i ‖k_i W − v_i‖² + λ² ‖W − W_0‖² + μ² ‖K_0 W − K_0 W_0‖²`` summed over the edited layers (arXiv
    2601.15686, eq. 7).

    λ, μ and K_0ᵀK_0 = n_0 E[kkᵀ] are those of the comparison's settings, for every editor. Only RLSEdit has
    targets v_i.

    Args:
        model: unedited.
        tok: its tokenizer.
        hparams: settings that the comparison starts from.
    """

    def __init__(
        self, model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: RLSEditHyperParams
    ) -> None:
        self._hparams = hparams
        edited = find_layout(model, hparams).edited
        self._names = {layer: weight.parameter_name.rpartition(".")[0] for layer, weight in edited.items()}
        self._unedited = {layer: weight.read() for layer, weight in edited.items()}
        has_anchors = hparams.mom2_adjustment and hparams.mu_reg > 0
        self._moments = (
            {layer: m.mean for layer, m in moments(model, tok, hparams).items()} if has_anchors else {}
        )

    def terms(self, model: nn.Module, editor: RLSEditor | None) -> dict[str, Any]:
        """The terms now: 'edits' (None for other editors than RLSEdit), 'deviation', 'anchors' (both None
        where an editor put something else in an edited weight's place).

        Args:
            model: edited.
            editor: RLSEdit's, or None.
        """
        hp = self._hparams
        try:
            change = {n: self._weight(model, n, editor) - W_0 for n, W_0 in self._unedited.items()}
        except (AttributeError, LayoutError):  # no such module, or none with a weight of its own
            return {"edits": None, "deviation": None, "anchors": None}
        anchors = sum(
            float((delta * (self._moments[layer].to(delta) @ delta)).sum())
            for layer, delta in change.items()
            if self._moments
        )
        return {
            "edits": None if editor is None else _missed(editor),
            "deviation": hp.lambda_reg**2 * sum(float(delta.square().sum()) for delta in change.values()),
            "anchors": hp.mu_reg**2 * hp.mom2_update_weight * anchors,
        }

    def _weight(self, model: nn.Module, layer: int, editor: RLSEditor | None) -> Tensor:
        """The weight as it is, (d_k, d_v), float32 or wider: RLSEdit's master where the model holds that one
        rounded.
        """
        weight = EditedWeight(model.get_submodule(self._names[layer]), self._names[layer])
        if editor is not None and layer in editor.state.layers:
            master = editor.state.now.weight(layer)
            if weight.holds(master):
                return master
        return weight.read()


def _missed(editor: RLSEditor) -> float:
    """``Σ d_i ‖k_i W − v_i‖²`` over all edits that stand and all layers."""
    history, solutions = editor.state.history, editor.state.layers
    if not history.live:
        return 0.0
    total = torch.zeros(())
    for layer, (K, V, D) in history.tensors(history.live, list(solutions)).items():
        W: Tensor = solutions[layer].weight
        total += (D.to(W)[..., None] * (K.to(W) @ W - V.to(W)).square()).sum().cpu()
    return float(total)
