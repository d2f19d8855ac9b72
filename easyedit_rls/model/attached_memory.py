"""A masked memory on a model: put on, found, taken off, saved and loaded; and what of a pass is a prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from easyedit_rls.errors import GateError
from easyedit_rls.model.gate import digest_of
from easyedit_rls.model.masked_memory import MaskedMemory

_NAME = "_easyedit_rls_memory"  # of the submodule, on its projection
_FILE = "masked_memory.safetensors"


def put_memory(
    model: nn.Module,
    projection: nn.Module,
    *,
    permutation: Tensor,
    background: Tensor,
    top_k: int,
    threshold: float,
) -> MaskedMemory:
    """Put an empty memory beside a projection of a model; see `MaskedMemory`.

    Raises:
        GateError: there is one with edits already.
    """
    known = find_memory_of(model)
    if known is not None and len(known[1].masks):
        raise GateError(
            f"The model has a memory with {len(known[1].masks)} edits beside {known[0]}. Take it off first: "
            "remove_memory(model)."
        )
    remove_memory(model)
    memory = MaskedMemory(projection, permutation, background, top_k, threshold)
    hang_memory(model, projection, memory)
    return memory


def hang_memory(model: nn.Module, projection: nn.Module, memory: MaskedMemory) -> None:
    """Put a memory that was taken off beside its projection again."""
    projection.add_module(_NAME, memory)
    projection.register_forward_hook(memory.add_edits)
    model.register_forward_pre_hook(memory.see_pass, with_kwargs=True)
    model.register_forward_hook(memory.end_pass, with_kwargs=True)


def find_memory_of(model: nn.Module) -> tuple[str, MaskedMemory] | None:
    """A model's masked memory, with its projection's name; None where there is none."""
    for name, module in model.named_modules():
        if _NAME in module._modules:
            memory: Any = module._modules[_NAME]
            return name, memory
    return None


def remove_memory(model: nn.Module) -> None:
    """Take the memory off a model, and its edits with it: it is the unedited one again."""
    known = find_memory_of(model)
    if known is None:
        return
    name, memory = known
    projection = model.get_submodule(name)
    for owner in (projection, model):
        for hooks in (owner._forward_hooks, owner._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is memory]:
                del hooks[key]
                owner._forward_pre_hooks_with_kwargs.pop(key, None)
                owner._forward_hooks_with_kwargs.pop(key, None)
    delattr(projection, _NAME)


def memory_weight_name(projection_name: str) -> str:
    """Full name of W_m for its projection's."""
    return f"{projection_name}.{_NAME}.weight"


def save_memory(model: nn.Module, folder: str | Path) -> None:
    """Write a model's masked memory into a folder: W_m, masks, permutation and background.

    Raises:
        GateError: the model has none.
    """
    known = find_memory_of(model)
    if known is None:
        raise GateError("The model has no memory with masks. Edit it with MEMOIR.")
    name, memory = known
    Path(folder).mkdir(parents=True, exist_ok=True)
    about = {"projection": name, "top_k": str(memory.top_k), "threshold": repr(memory.threshold)}
    about["unedited"] = digest_of({name: model.get_submodule(name)})
    tensors = {key: value.contiguous() for key, value in memory.tensors().items()}
    save_file(tensors, Path(folder) / _FILE, about)


def load_memory(model: nn.Module, folder: str | Path) -> MaskedMemory:
    """Put a memory that `save_memory` wrote on the unedited model.

    Raises:
        GateError: the folder holds none, or it is another model's.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        raise GateError(f"There is no {path}. Give a folder that a memory with masks was saved in.")
    tensors, about = load_file(path), _metadata(path)
    projection = dict(model.named_modules()).get(about["projection"])
    if projection is None or digest_of({about["projection"]: projection}) != about["unedited"]:
        raise GateError(
            f"{path} was made with another model, or with this one in another type. Load the unedited model "
            "as it was when it was edited."
        )
    memory = put_memory(
        model,
        projection,
        permutation=tensors["permutation"],
        background=tensors["background"],
        top_k=int(about["top_k"]),
        threshold=float(about["threshold"]),
    )
    memory.take(tensors)
    return memory


def reads_prompts(model: nn.Module) -> bool:
    """Whether what a model says hangs on what of a text is its prompt."""
    return find_memory_of(model) is not None


@contextmanager
def prompts_of(model: nn.Module, lengths: Sequence[int]) -> Iterator[None]:
    """Within the block, a pass's rows have so many tokens of prompt, one number a row; what follows them is
    answer. Where the model has no memory that reads prompts, nothing happens.
    """
    known = find_memory_of(model)
    if known is None:
        yield
        return
    known[1].told = torch.tensor(lengths)
    try:
        yield
    finally:
        known[1].told = None


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})
