"""What several tests do: take the weights of a model or an editor, and compare them bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from easyedit_rls import RLSEditor

FADING = {  # settings of the rule that forgets
    0.9: {"solver": "forgetting", "solver_settings": {"factor": 0.9}},
    "adaptive": {"solver": "forgetting"},
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def edited_weights(editor: RLSEditor) -> dict[int, Tensor]:
    """Copies of an editor's edited weights, by layer."""
    return {layer: weight.snapshot() for layer, weight in editor.layout.edited.items()}


def same(one: Mapping, other: Mapping) -> bool:
    """Whether two mappings hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
