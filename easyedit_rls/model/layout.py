"""Where the modules are that editing needs, found by the names in the settings."""

import copy
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from easyedit_rls.errors import LayoutError
from easyedit_rls.model.batching import positions_follow_mask
from easyedit_rls.model.cast import CastParameters
from easyedit_rls.model.discovery import obstacle
from easyedit_rls.model.hooks import form_of, record_outputs, skip_layers
from easyedit_rls.model.residual import Residual, find_residual
from easyedit_rls.model.weights import EditedWeight, shared_with
from easyedit_rls.model.wrapped import refuse_wrapped

_KEPT = "_easyedit_rls_"  # begins the names of what this package keeps on a model


class ModuleNames(Protocol):
    """What settings say of a model's modules (`config.hparams`), and what is edited of them."""

    layers: list[int]
    v_loss_layer: int
    rewrite_module_tmp: str
    layer_module_tmp: str
    ln_f_module: str
    lm_head_module: str


@dataclass(frozen=True)
class Layout:
    """Modules of one model, as its settings name them.

    Attributes:
        model: the model.
        edited: layer number -> its edited weight, ascending.
        layers: all decoder layers.
        n_lower: how many there are up to the value layer, which is the last edited one.
        loss_layer: decoder layer whose output the model's end (final norm, head) reads.
        casts: the model's parameters in another type, for `cast_copy`; freed with the layout.
    """

    model: PreTrainedModel
    edited: dict[int, EditedWeight]
    layers: list[nn.Module]
    n_lower: int
    loss_layer: nn.Module
    casts: CastParameters = field(default_factory=CastParameters, compare=False, repr=False)

    def refuse_if_replaced(self) -> None:
        """See that the edited modules are still the model's.

        Raises:
            LayoutError: one was replaced since they were looked up.
        """
        for weight in self.edited.values():
            try:
                module = self.model.get_submodule(weight.parameter_name.rpartition(".")[0])
            except AttributeError:
                module = None
            if module is not weight.module:
                raise LayoutError(
                    f"The module of {weight.parameter_name} was replaced or removed since. "
                    "Make a new editor of the model."
                )

    @property
    def lower_layers(self) -> list[nn.Module]:
        """Decoder layers from the first to the value layer."""
        return self.layers[: self.n_lower]

    @property
    def value_layer(self) -> nn.Module:
        """Decoder layer whose output the values are."""
        return self.layers[self.n_lower - 1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits in float32 from the loss layer's output, (n, d) -> (n, vocabulary).

        What follows the layers is the model's own code, so a norm, a projection, scaled or capped logits are
        whatever they are there.
        """
        tokens = torch.zeros(
            len(hidden), 1, dtype=torch.long, device=self.model.get_input_embeddings().weight.device
        )
        with skip_layers(self.layers, self._forms, hidden[:, None]):
            logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits[:, 0].float()

    @cached_property
    def residuals(self) -> dict[int, Residual]:
        """How each edited layer's output follows its projection's.

        Raises:
            LayoutError: something else than a factor and a norm stands between.
        """
        return {
            layer: find_residual(self.model, self.layers[layer], weight.module, weight.parameter_name)
            for layer, weight in self.edited.items()
        }

    @cached_property
    def _forms(self) -> list[Any]:
        """What each layer returns beside the hidden states."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.get_input_embeddings().weight.device)
        with torch.no_grad(), record_outputs(self.layers) as outputs:
            self.model(input_ids=token, use_cache=False)
        return [form_of(output) for output in outputs]


def find_layout(model: PreTrainedModel, settings: ModuleNames) -> Layout:
    """Look up every module that the settings name.

    Raises:
        LayoutError: the settings are another model's (lists every difference, with what there is instead), or
            the model can't be edited.
    """
    refuse_wrapped(model)
    layers = _layers(model, settings.layer_module_tmp)
    inside = [layer for layer in settings.layers if layer < len(layers)]
    obstacles = {layer: reason for layer in inside if (reason := obstacle(layers[layer]))}
    plain = [layer for layer in settings.layers if layer not in obstacles]
    differences = [*_wrong_numbers(settings, len(layers)), *_wrong_names(model, settings, layers, plain)]
    refused = [f"Layer {layer} can't be edited: {reason}" for layer, reason in obstacles.items()]
    if differences:
        raise LayoutError(
            f"These settings do not fit {type(model).__name__}: {'; '.join(differences + refused)}. "
            "Change them to the model's own, "
            f"or have settings made for it: easyedit-rls init {model.config._name_or_path or 'MODEL'}."
        )
    if refused:
        raise LayoutError(f"{'; '.join(refused)}.")
    names = {layer: settings.rewrite_module_tmp.format(layer) for layer in settings.layers}
    edited = {layer: EditedWeight(model.get_submodule(name), name) for layer, name in names.items()}
    for layer, weight in edited.items():
        other = shared_with(model, weight)
        if other is not None:
            raise LayoutError(
                f"Weight {weight.parameter_name} is also {other}: "
                f"what is edited into layer {layer} would change that too. "
                "Edit other layers, or give each a copy of its own."
            )
    if not positions_follow_mask(model):
        raise LayoutError(
            f"{type(model).__name__} takes no position_ids and counts padding as text, "
            "so prompts of unlike lengths can't run together."
        )
    return Layout(model, edited, layers, settings.layers[-1] + 1, layers[-1])


def cast_copy(layout: Layout, dtype: torch.dtype) -> Layout:
    """The same modules in a copy of the model whose parameters have another type.

    The casts belong to the layout: they are made once and then brought up to date in the same memory
    (`CastParameters`), bit for bit as a fresh cast, so a copy is good until the next one is made. All else,
    such as buffers, hooks and the configuration, is copied anew each time: on SmolLM2-135M that takes 0.02 s.
    Buffers stay in their type: a rotary embedding's frequencies hold positions apart only in float32.
    Parameters are never held twice in their own type. On the CPU attention is the model's plain one: there
    torch's fused one takes fifteen times as long to go back through in bfloat16 as in float32.
    """
    model = layout.model
    floating = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    edited = [weight.parameter for weight in layout.edited.values()]
    copies: dict[int, Any] = {**layout.casts.updated(floating, dtype, edited)}
    kept = [value for name, value in vars(model).items() if name.startswith(_KEPT)]
    copies |= {id(value): {} for value in kept}  # states are large, and of no use in a copy
    low = copy.deepcopy(layout, copies)
    if low.model.device.type == "cpu":
        low.model.set_attn_implementation("eager")
    return low


def _layers(model: nn.Module, template: str) -> list[nn.Module]:
    """The decoder layers, in order; none where the template names none."""
    pattern = re.compile(re.escape(template).replace(r"\{\}", r"(\d+)") + "$")
    found = {
        int(match.group(1)): module
        for name, module in model.named_modules()
        if (match := pattern.match(name))
    }
    return [found[number] for number in sorted(found)]


def _wrong_numbers(settings: ModuleNames, n_layers: int) -> list[str]:
    """Layers that the model lacks, and a depth that is not its own; nothing where no layer was found to
    count.
    """
    found = []
    beyond = [str(layer) for layer in settings.layers if layer >= n_layers]
    if n_layers and beyond:
        found.append(f"layers: no layer {', '.join(beyond)}: its {n_layers} layers are 0 to {n_layers - 1}")
    if n_layers and settings.v_loss_layer != n_layers - 1:
        found.append(
            f"v_loss_layer: {settings.v_loss_layer}, but the last of its {n_layers} layers is {n_layers - 1}"
        )
    return found


def _wrong_names(
    model: nn.Module, settings: ModuleNames, layers: Sequence[nn.Module], wanted: Sequence[int]
) -> list[str]:
    """Modules that the settings name and the model lacks, with the names that come closest.

    Edited modules are looked for in those of the `wanted` layers that the model has, else in its first layer.
    """
    edited = [layer for layer in wanted if layer < len(layers)] or ([0] if wanted else [])
    names = {
        "layer_module_tmp": [] if layers else [settings.layer_module_tmp.format(0)],
        "rewrite_module_tmp": [settings.rewrite_module_tmp.format(layer) for layer in edited],
        "ln_f_module": [settings.ln_f_module],
        "lm_head_module": [settings.lm_head_module],
    }
    there = {name for name, _ in model.named_modules(remove_duplicate=False)}
    found = []
    for setting, asked in names.items():
        missing = [name for name in asked if name not in there]
        if missing:
            close = difflib.get_close_matches(missing[0], sorted(there), n=3, cutoff=0.4)
            more = f" and {len(missing) - 1} more like it" if len(missing) > 1 else ""
            hint = f" (close names: {', '.join(close)})" if close else ""
            found.append(f"{setting}: no module '{missing[0]}'{more}{hint}")
    return found
