"""Settings that are read off a model: its modules, the layers to edit, where values are put, and how far a
step goes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from easyedit_rls.errors import LayoutError
from easyedit_rls.model.discovery import Structure, read_structure
from easyedit_rls.model.hooks import tap
from easyedit_rls.model.residual import find_residual

_DEPTH = (0.07, 0.34)  # SmolLM2-135M: layers 2 to 10 of 30
_STEP = 0.11  # SmolLM2-135M: v_lr 0.7, 24 = sqrt(d), hidden states of norm 150
_PUBLISHED_RATE = 0.5
# Gemma 3 270M: a longer step or a wider margin costs more than it gains; v_lr is relative to the outputs'
# length
_AT_OUTPUTS = {"v_lr": 0.055, "early_stopping_margin": 2.0, "overshoot": 1.0, "mom2_update_weight": 200}


def settings_of(model: PreTrainedModel, layers: Sequence[int] | None = None) -> dict[str, Any]:
    """Settings by name: those that differ from model to model.

    Layers lie at the depth that was tuned on SmolLM2-135M (0.07 to 0.34 of all). `v_lr` is in the same
    proportion to the hidden states at the value layer as there, seen in a pass of random tokens; a model on
    the meta device gets the published 0.5. Where a norm stands behind an edited MLP, values are put at the
    MLPs' outputs, with `v_lr`, margin and n_0 as tuned on Gemma 3 270M.

    Args:
        model: a causal language model.
        layers: which to edit, if that is known.

    Raises:
        LayoutError: the layout can't be told, or the layers can't be edited; says what was found.
    """
    structure = read_structure(model)
    layers = layers_by_depth(structure.n_layers) if layers is None else list(layers)
    for layer in layers:
        if layer in structure.obstacles:
            free = [n for n in range(structure.n_layers) if n not in structure.obstacles]
            raise LayoutError(
                f"Layer {layer} can't be edited: {structure.obstacles[layer]}. Layers that can: {free}."
            )
    return {
        "model_name": model.config._name_or_path or type(model).__name__,
        "device": "cpu" if model.device.index is None else model.device.index,
        "layers": layers,
        "v_loss_layer": structure.n_layers - 1,
        **_value_settings(model, structure, layers),
        "mom2_n_samples": max(400, structure.key_width // 8),  # 16 tokens a direction of the keys
        **structure.module_names(),
    }


def layers_by_depth(n_layers: int) -> list[int]:
    """Layers at the depth of those that are edited in SmolLM2-135M.

    >>> layers_by_depth(30)
    [2, 3, 4, 5, 6, 7, 8, 9, 10]
    """
    return list(range(round(_DEPTH[0] * n_layers), round(_DEPTH[1] * n_layers) + 1))


def _value_settings(model: PreTrainedModel, structure: Structure, layers: Sequence[int]) -> dict[str, Any]:
    """Where values are put, and the step: `_STEP` of a hidden state's length, if every coordinate moves by
    it.
    """
    if model.device.type == "meta":
        return {"v_lr": _PUBLISHED_RATE}
    for layer in layers:
        name = f"{structure.layers}.{layer}"
        projection = f"{name}.{structure.projection}"
        if (
            find_residual(model, model.get_submodule(name), model.get_submodule(projection), projection).norm
            is not None
        ):
            return {"value_at": "output", **_AT_OUTPUTS}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (8, 16), generator=generator).to(
        model.device
    )
    value_layer = model.get_submodule(f"{structure.layers}.{layers[-1]}")
    with torch.no_grad(), tap(outputs={"hidden": value_layer}, stop=True) as seen:
        model(input_ids=ids, use_cache=False)
    hidden = seen["hidden"][:, 1:].float()  # the first token's norm is not like the others'
    return {"v_lr": float(f"{_STEP * float(hidden.norm(dim=-1).median()) / hidden.shape[-1] ** 0.5:.2g}")}
