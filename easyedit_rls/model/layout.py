"""Where the modules are that editing needs, found by the names in the settings."""

import difflib
import re
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from easyedit_rls.errors import LayoutError
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.model.weights import EditedWeight


@dataclass(frozen=True)
class Layout:
    """Modules of one model, as its settings name them.

    Attributes:
        edited: layer number -> its edited weight, ascending.
        lower_layers: decoder layers from the first to the value layer, which is the last edited one.
        loss_layer: decoder layer whose output final norm and head read.
        final_norm: the norm before the head.
        head: the output head, or the embedding it is tied to.
    """

    edited: dict[int, EditedWeight]
    lower_layers: list[nn.Module]
    loss_layer: nn.Module
    final_norm: nn.Module
    head: nn.Module

    @property
    def value_layer(self) -> nn.Module:
        """Decoder layer whose output the values are."""
        return self.lower_layers[-1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in float32 from the loss layer's output, (..., d) -> (..., vocabulary)."""
        normed = self.final_norm(hidden)
        if isinstance(self.head, nn.Embedding):
            return F.linear(normed, self.head.weight).float()
        logits: Tensor = self.head(normed)
        return logits.float()


def find_layout(model: nn.Module, hparams: RLSEditHyperParams) -> Layout:
    """Look up every module that the settings name.

    Raises:
        LayoutError: a module is missing (with what there is instead), or can't be edited.
    """
    for layer in (*hparams.layers, hparams.v_loss_layer):
        _check_layer(model, hparams.layer_module_tmp, layer)
    edited = {
        layer: EditedWeight(_module(model, name, "rewrite_module_tmp"), name)
        for layer in hparams.layers
        for name in [hparams.rewrite_module_tmp.format(layer)]
    }
    return Layout(
        edited=edited,
        lower_layers=[
            _module(model, hparams.layer_module_tmp.format(layer), "layer_module_tmp") for layer in range(hparams.layers[-1] + 1)
        ],
        loss_layer=_module(model, hparams.layer_module_tmp.format(hparams.v_loss_layer), "layer_module_tmp"),
        final_norm=_module(model, hparams.ln_f_module, "ln_f_module"),
        head=_module(model, hparams.lm_head_module, "lm_head_module"),
    )


def _check_layer(model: nn.Module, template: str, layer: int) -> None:
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)") + "$")
    numbers = [int(match.group(1)) for name, _ in model.named_modules() if (match := pattern.match(name))]
    if not numbers:
        _module(model, template.format(0), "layer_module_tmp")
    if layer not in numbers:
        raise LayoutError(
            f"The model has no layer {layer}: its {len(numbers)} layers are 0 to {max(numbers)}. Change layers or v_loss_layer."
        )


def _module(model: nn.Module, name: str, setting: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as exc:
        names = [known for known, _ in model.named_modules() if known]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise LayoutError(f"{type(model).__name__} has no module '{name}'{hint}. Set {setting} to the model's own names.") from exc
