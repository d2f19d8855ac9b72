"""What several tests do: take weights of a model or editor, or the files of a ledger, and compare them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from easyedit_rls import RLSEditor
from easyedit_rls.model.gated_weight import find_decision

FADING = {  # settings of the rule that forgets
    0.9: {"solver": "forgetting", "solver_settings": {"factor": 0.9}},
    "adaptive": {"solver": "forgetting"},
}
FORGETTING = [{}, *FADING.values()]  # settings without forgetting, and with each kind of it


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a model's tensors, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def edited_weights(editor: RLSEditor) -> dict[int, Tensor]:
    """Copies of an editor's edited weights, by layer."""
    return {layer: weight.snapshot() for layer, weight in editor.layout.edited.items()}


def same(one: Mapping, other: Mapping) -> bool:
    """Whether two mappings hold the same tensors, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def same_state(one: RLSEditor, other: RLSEditor) -> bool:
    """Whether two editors have the same state, weights and edits, bit for bit."""
    tensors = [
        {f"{layer}.{name}": t for layer, s in e.state.layers.items() for name, t in s.tensors().items()}
        for e in (one, other)
    ]
    return (
        same(*tensors)
        and same(edited_weights(one), edited_weights(other))
        and one.state.history.live == other.state.history.live
    )


def content(folder: str | Path) -> dict[str, bytes]:
    """All files that count: not the second name of a head that was replaced."""
    files_of = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files_of.items() if not name.endswith(".before")}


def gate_tensors(editor: RLSEditor) -> dict[str, Tensor]:
    """Copies of what an editor has put behind its gate, and of what the gate goes by."""
    decision = find_decision(editor.layout)
    weights = {str(layer): weight.parameter.clone() for layer, weight in editor.layout.edited.items()}
    return {**weights, "factors": decision.factors.clone(), "threshold": torch.tensor(decision.threshold)}
