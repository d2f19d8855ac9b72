"""The three terms of RLSEdit's objective at whatever weights an editor left: one yardstick for all."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.cache import moments
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.errors import LayoutError
from easyedit_rls.evaluation.objective import objective
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.weights import EditedWeight


class Objective:
    """`evaluation.objective`, summed over the edited layers, with V_0 = K_0 W_0.

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
        found = moments(model, tok, hparams) if has_anchors else {}
        self._grams = {layer: m.mean * hparams.mom2_update_weight for layer, m in found.items()}

    def terms(self, model: nn.Module, editor: RLSEditor | None) -> dict[str, Any]:
        """The terms now: 'edits' (None for other editors than RLSEdit), 'deviation', 'anchors' (both None
        where an editor put something else in an edited weight's place).

        Args:
            model: edited.
            editor: RLSEdit's, or None.
        """
        hp, edits = self._hparams, _edits(editor)
        try:
            weights = {layer: self._weight(model, layer, editor) for layer in self._unedited}
        except (AttributeError, LayoutError):  # no such module, or none with a weight of its own
            return {"edits": None, "deviation": None, "anchors": None}
        terms = [
            objective(
                weights[layer],
                W_0,
                [edits[layer]] if layer in edits else [],
                self._grams.get(layer),
                hp.lambda_reg,
                hp.mu_reg,
            )
            for layer, W_0 in self._unedited.items()
        ]
        return {
            "edits": None if editor is None else sum(term.edits for term in terms),
            "deviation": sum(term.deviation for term in terms),
            "anchors": sum(term.anchors for term in terms),
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


def _edits(editor: RLSEditor | None) -> dict[int, list[Tensor]]:
    """layer -> keys, targets and importances of all edits that stand, in the newest shard."""
    if editor is None:
        return {}
    history = editor.state.history
    edit_ids = history.in_shard(len(editor.state.now.shards))
    return history.tensors(edit_ids, list(editor.state.layers)) if edit_ids else {}
