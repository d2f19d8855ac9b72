"""How far a contender has come: on disk after each batch, so that a run that was broken off goes on there."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedModel

from easyedit_rls._base.files import write_file

PROGRESS = "progress.safetensors"
_WEIGHT, _MEMORY = "weight.", "memory."


@dataclass(frozen=True)
class Progress:
    """Attributes:
    seconds: an edit, one for each batch that is done.
    weights: of the model, those that the edits have changed.
    memory: what the editor remembers beside them.
    """

    seconds: list[float]
    weights: Mapping[str, Tensor]
    memory: Mapping[str, Tensor]

    @classmethod
    def read(cls, place: Path) -> "Progress | None":
        """What is in a contender's folder, or None."""
        path = place / PROGRESS
        if not path.is_file():
            return None
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            seconds = json.loads(file.metadata()["seconds"])
        kinds = [
            {name.removeprefix(kind): t for name, t in tensors.items() if name.startswith(kind)}
            for kind in (_WEIGHT, _MEMORY)
        ]
        return cls(seconds, *kinds)

    @torch.no_grad()
    def restore(self, model: PreTrainedModel) -> bool:
        """Write the changed weights into an unedited model; False if it lacks one of them."""
        parameters = dict(model.named_parameters())
        if not self.weights.keys() <= parameters.keys():
            return False
        for name, weight in self.weights.items():
            parameters[name].copy_(weight)
        return True


def changed_weights(model: PreTrainedModel, unedited: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that have changed, detached, of those that the unedited model has by name and shape."""
    return {
        name: weight.detach()
        for name, weight in model.named_parameters()
        if name in unedited
        and weight.shape == unedited[name].shape
        and not torch.equal(weight, unedited[name])
    }


def write_progress(
    place: Path,
    model: PreTrainedModel,
    unedited: Mapping[str, Tensor],
    memory: Mapping[str, Tensor],
    seconds: Sequence[float],
) -> None:
    """Write down that another batch is done; the last such file stays until this one is whole."""
    changed = changed_weights(model, unedited)
    tensors = {f"{_WEIGHT}{name}": weight.contiguous() for name, weight in changed.items()}
    tensors |= {f"{_MEMORY}{name}": tensor.contiguous() for name, tensor in memory.items()}
    write_file(place / PROGRESS, save(tensors, {"seconds": json.dumps(list(seconds))}))
