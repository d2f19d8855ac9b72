"""What a decoder is made of, read off its modules: no family's names are known here.

A decoder layer is a member of a module list whose members all hold an attention. Its MLP's output projection
is the last linear module outside of attention that gives hidden states; gated, fused and parallel MLPs, and
layers without a module of that kind around their linear modules (OPT), all end so. Where this does not tell,
the error shows what was found.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from easyedit_rls.errors import LayoutError
from easyedit_rls.model.wrapped import refuse_wrapped

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Where GPTQ, AWQ, bitsandbytes, HQQ, compressed-tensors and torch's own dynamic quantization keep their
# integers.
_PACKED = ("qweight", "qzeros", "quant_state", "W_q", "weight_packed", "_packed_params")


@dataclass(frozen=True)
class Structure:
    """Names of a decoder's parts, and its sizes.

    Attributes:
        layers: the list of decoder layers.
        n_layers: how many there are.
        hidden: width of a hidden state.
        key_width: d_k, inputs of the MLP's output projection.
        projection: that module, within a layer.
        mlp: what it is part of, within a layer; itself where it is the layer's own.
        attention: the attention, within a layer.
        final_norm: the norm after the last layer; '' where there is none.
        head: the output head.
        is_tied: whether the head's weight is the embedding's.
        obstacles: layer -> why its MLP can't be edited; empty for most models.
    """

    layers: str
    n_layers: int
    hidden: int
    key_width: int
    projection: str
    mlp: str
    attention: str
    final_norm: str
    head: str
    is_tied: bool
    obstacles: dict[int, str]

    def module_names(self) -> dict[str, str]:
        """The settings that name modules, as EasyEdit's YAML files have them."""
        layer = f"{self.layers}.{{}}"
        return {
            "rewrite_module_tmp": f"{layer}.{self.projection}",
            "layer_module_tmp": layer,
            "mlp_module_tmp": f"{layer}.{self.mlp}",
            "attn_module_tmp": f"{layer}.{self.attention}",
            "ln_f_module": self.final_norm,
            "lm_head_module": self.head,
        }


def read_structure(model: PreTrainedModel) -> Structure:
    """Read off a causal language model where its parts are; runs nothing, so a model on the meta device will
    do.

    Raises:
        LayoutError: it can't be told, or no layer can be edited (a mixture of experts, quantized weights, an
            adapter); says what was found.
    """
    refuse_wrapped(model)
    config = model.config.get_text_config()
    name, layers = _layer_list(model)
    places: dict[str, nn.Module] = {}
    obstacles: dict[int, str] = {}
    for number, layer in enumerate(layers):
        reason = obstacle(layer)
        path = "" if reason else _projection(layer, config.hidden_size)
        if reason or not path:
            obstacles[number] = (
                reason
                or f"no linear module outside of attention gives {config.hidden_size} outputs: "
                f"{_inventory(layer)}"
            )
        else:
            places.setdefault(path, layer)
    if len(places) != 1:
        found = (
            f"projections in unlike places ({', '.join(places)})" if places else f"{name}.0: {obstacles[0]}"
        )
        raise LayoutError(f"No MLP of {type(model).__name__} can be edited: {found}.")
    projection, layer = next(iter(places.items()))
    head = model.get_output_embeddings()
    if head is None:
        raise LayoutError(f"{type(model).__name__} has no output head. Load it with AutoModelForCausalLM.")
    embedding = model.get_input_embeddings()
    return Structure(
        layers=name,
        n_layers=len(layers),
        hidden=config.hidden_size,
        key_width=_parameter(layer.get_submodule(projection)).numel() // config.hidden_size,
        projection=projection,
        mlp=projection.rpartition(".")[0] or projection,
        attention=_attention(layer),
        final_norm=_final_norm(model, name),
        head=_name_of(model, head),
        is_tied=embedding is not None and _parameter(embedding) is _parameter(head),
        obstacles=obstacles,
    )


def _layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers; where a model has others too (a vision tower's), the one in its text
    decoder.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_attention(layer) for layer in module)
    }
    decoder = model.get_decoder()
    if len(found) > 1 and decoder is not None:
        inside = {id(module) for module in decoder.modules()}
        found = {name: module for name, module in found.items() if id(module) in inside}
    if len(found) != 1:
        listed = [
            f"{name} ({len(m)} × {type(m[0]).__name__})"
            for name, m in model.named_modules()
            if isinstance(m, nn.ModuleList) and len(m)
        ]
        what = (
            f"several lists of layers with attention ({', '.join(found)})"
            if found
            else "no list of layers with attention"
        )
        raise LayoutError(
            f"{type(model).__name__} has {what}; lists of modules in it: {', '.join(listed) or 'none'}. "
            "Name its modules in a settings file (rewrite_module_tmp, layer_module_tmp, ...)."
        )
    return next(iter(found.items()))


def _attention(layer: nn.Module) -> str:
    """Name of a layer's attention, told by its class; '' if there is none."""
    return next(
        (name for name, child in layer.named_children() if "attention" in type(child).__name__.lower()), ""
    )


def _outside_attention(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in layer.named_children():
        if "attention" not in type(child).__name__.lower():
            yield name, child
            yield from ((f"{name}.{below}", module) for below, module in child.named_modules() if below)


def obstacle(layer: nn.Module) -> str:
    """Why the MLP of a layer can't be edited; '' if it can."""
    for name, module in _outside_attention(layer):
        if is_parametrized(module):
            cure = "Make it permanent first (remove_parametrizations)"
            return f"{name} is computed from other weights before each pass (a parametrization). {cure}"
        if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)) or isinstance(
            module, nn.ModuleList
        ):
            return (
                f"{name} is a mixture of experts ({type(module).__name__}), where a fact has no one place: "
                "each token goes another way"
            )
        if any(hasattr(module, mark) for mark in _PACKED) or not all(
            map(_is_plain, module.parameters(recurse=False))
        ):
            return (
                f"{name} is quantized ({type(module).__name__}), "
                "and edited weights have to be ordinary floating-point numbers. "
                "Load the model in float32, bfloat16 or float16"
            )
    return ""


def _is_plain(parameter: Tensor) -> bool:
    """Whether a parameter's numbers are its own floats; torchao's quantized ones are tensors that only pass
    for such.
    """
    return parameter.dtype in _FLOATS and not is_traceable_wrapper_subclass(parameter)


def _projection(layer: nn.Module, hidden: int) -> str:
    """Name of the MLP's output projection, '' if there is none."""
    linear = [(name, m) for name, m in _outside_attention(layer) if isinstance(m, (nn.Linear, Conv1D))]
    return next(
        (
            name
            for name, m in reversed(linear)
            if (m.nf if isinstance(m, Conv1D) else m.out_features) == hidden
        ),
        "",
    )


def _final_norm(model: PreTrainedModel, layers: str) -> str:
    """Name of the norm beside the list of layers; one after the embedding does not count."""
    parent, _, _ = layers.rpartition(".")
    norms = [
        name
        for name, m in model.get_submodule(parent).named_children()
        if "norm" in type(m).__name__.lower() and "embed" not in name
    ]
    if len(norms) > 1:
        raise LayoutError(
            f"{type(model).__name__} has several norms beside {layers}: {', '.join(norms)}. "
            "Set ln_f_module in a settings file."
        )
    return f"{parent}.{norms[0]}".lstrip(".") if norms else ""


def _parameter(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    return names[wanted]


def _inventory(layer: nn.Module) -> str:
    """The modules of a layer that hold weights, for messages."""
    return ", ".join(
        f"{name} {type(module).__name__}{tuple(next(module.parameters(recurse=False)).shape)}"
        for name, module in layer.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    )
