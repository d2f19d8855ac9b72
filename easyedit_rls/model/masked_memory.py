"""A memory beside one projection, reached through masks of its inputs (MEMOIR, Wang et al. 2025, arXiv
2506.07899, section 3):

    y = W_0 a + W_m (M ⊙ a)

W_0 stays as it is; W_m begins as zeros. Each edit has a mask M of `top_k` inputs, made of its prompt
(*TopHash*): f is the mean of a over the prompt's tokens, less a background mean; the largest |f|, sent
through a fixed permutation π, are the active inputs. A prompt that is asked later has a mask of its own. The
stored mask that shares most with it is used, if it shares at least a threshold; else W_m adds nothing, and
the output is W_0's to the bit. Two prompts that have nothing to do with each other share about top_k / d_k.

What is the prompt? In a pass without a cache, the whole text, unless `prompts_of` tells how much of it; in a
generation, what came before the first new token. The same mask serves all tokens behind it.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from easyedit_rls.errors import GateError

_NAME = "_easyedit_rls_memory"  # of the submodule, on its projection
_FILE = "masked_memory.safetensors"


class MaskedMemory(nn.Module):
    """W_m, the masks of its edits, and the way to them. It keeps its types when the model is cast, and is in
    no state dict.

    Args:
        projection: ``nn.Linear`` or transformers' ``Conv1D``.
        permutation: π, (d_k,), int64.
        background: mean of the features of texts that have nothing to do with edits, (d_k,), float32.
        top_k: active inputs of a mask.
        threshold: share of its active inputs that a prompt's mask must have in common with a stored one.

    Attributes:
        weight: W_m in the projection's own orientation, float32.
        masks: of the edits so far, (n, d_k), bool.
        overlap: of the last prompts, the largest share with a stored mask, (rows,); None before the first.
        forced: a mask that all tokens use, whatever the prompt, (d_k,), bool; None where the prompt decides.
        told: prompt tokens of each row of the next pass, (rows,); None where the whole text is the prompt.
        before: W_m and the number of masks before the last batch; None before the first.
    """

    def __init__(
        self, projection: nn.Module, permutation: Tensor, background: Tensor, top_k: int, threshold: float
    ) -> None:
        super().__init__()
        given: Any = projection.weight
        self.weight = nn.Parameter(torch.zeros_like(given, dtype=torch.float32), requires_grad=False)
        self.permutation, self.background = permutation.to(given.device), background.to(given.device).float()
        self.masks = torch.zeros(0, len(permutation), dtype=torch.bool, device=given.device)
        self.top_k, self.threshold = top_k, threshold
        self.overlap: Tensor | None = None
        self.forced: Tensor | None = None
        self.told: Tensor | None = None
        self.before: tuple[Tensor, int] | None = None
        self._is_linear = isinstance(projection, nn.Linear)
        self._real: Tensor | None = None  # of the pass: its attention mask
        self._goes_on = False  # whether the pass has a cache: it goes on behind a prompt
        self._selected: Tensor | None = None  # of the last prompts, (rows, d_k)

    def features(self, keys: Tensor, is_prompt: Tensor) -> Tensor:
        """f of prompts.

        Args:
            keys: (rows, length, d_k).
            is_prompt: (rows, length), bool.

        Returns:
            (rows, d_k), float32.
        """
        share = is_prompt / is_prompt.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("rl,rlk->rk", share, keys.float()) - self.background

    def masks_of(self, features: Tensor) -> Tensor:
        """Masks of features, (rows, d_k) -> (rows, d_k), bool."""
        active = self.permutation[features.abs().topk(self.top_k, dim=1).indices]
        return torch.zeros_like(features, dtype=torch.bool).scatter_(1, active, True)

    def see_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's forward pre-hook: which tokens of a pass are real, and whether it goes on."""
        past = kwargs.get("past_key_values", kwargs.get("cache"))
        self._goes_on = past is not None and int(past.get_seq_length()) > 0
        self._real = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def add_edits(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The projection's forward hook: output with what W_m adds."""
        keys = args[0]
        if self.forced is not None:
            return output + self._part(keys, self.forced.expand(len(keys), -1), output)
        if not len(self.masks):
            return output
        if not self._goes_on:
            self._selected = self._select(keys)
        selected = self._selected
        if selected is None or len(selected) != len(keys):
            raise GateError(
                "A pass goes on behind other prompts than the last one's. Run their prompts first."
            )
        is_open = selected.any(1)
        if keys.device.type != "cpu":  # no waiting for what is open
            return torch.where(is_open[:, None, None], output + self._part(keys, selected, output), output)
        if not bool(is_open.any()):
            return output
        output = output.clone()
        output[is_open] += self._part(keys[is_open], selected[is_open], output)
        return output

    def begin_batch(self) -> None:
        """Note down what there is. Where somebody put W_m back to what it was before the last batch, that
        batch's masks go first.
        """
        if self.before is not None and torch.equal(self.weight, self.before[0]):
            self.masks = self.masks[: self.before[1]]
        self.before = self.weight.detach().clone(), len(self.masks)

    def take_back(self) -> None:
        """Be what `begin_batch` noted down."""
        if self.before is not None:
            self.weight.data.copy_(self.before[0])
            self.masks = self.masks[: self.before[1]]

    def tensors(self) -> dict[str, Tensor]:
        """All that is remembered, by name; masks as bits."""
        bits = torch.from_numpy(np.packbits(self.masks.cpu().numpy(), axis=1))
        known = {
            "weight": self.weight.detach(),
            "permutation": self.permutation,
            "background": self.background,
        }
        return {**known, "masks": bits}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Be what `tensors` gave.

        Raises:
            GateError: they are another projection's.
        """
        if tensors["weight"].shape != self.weight.shape:
            raise GateError(
                f"The memory is of shape {tuple(tensors['weight'].shape)}, the projection "
                f"{tuple(self.weight.shape)}. Load the model that was edited."
            )
        self.weight.copy_(tensors["weight"])
        self.permutation, self.background = (
            tensors[name].to(self.weight.device) for name in ("permutation", "background")
        )
        masks = np.unpackbits(tensors["masks"].cpu().numpy(), axis=1, count=len(self.permutation))
        self.masks = torch.from_numpy(masks).to(self.weight.device, torch.bool)

    def _select(self, keys: Tensor) -> Tensor:
        """The stored mask for each row's prompt, (rows, d_k); no input where too little is shared."""
        is_prompt = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        if self._real is not None:
            if self._real.dim() != 2:
                raise GateError("A memory with masks reads prompts. Give each its own row, padded.")
            is_prompt = self._real.to(keys.device).bool()
        if self.told is not None:
            is_prompt = is_prompt & (is_prompt.cumsum(1) <= self.told.to(keys.device)[:, None])
        asked = self.masks_of(self.features(keys, is_prompt))
        shared = asked.float() @ self.masks.float().T / self.top_k
        self.overlap, nearest = shared.max(1)
        return self.masks[nearest] & (self.overlap >= self.threshold)[:, None]

    def _part(self, keys: Tensor, masks: Tensor, output: Tensor) -> Tensor:
        """W_m (M ⊙ a) in the output's type; keys (rows, length, d_k), masks (rows, d_k)."""
        weight = self.weight if self._is_linear else self.weight.T
        return F.linear((keys * masks[:, None]).float(), weight).to(output.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> "MaskedMemory":
        """Go to another device with the model, but into no other type."""
        device = fn(torch.empty(0).to(self.weight)).device
        self.weight.data = self.weight.data.to(device)
        self.permutation, self.background, self.masks = (
            some.to(device) for some in (self.permutation, self.background, self.masks)
        )
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A state dict is the unedited model's."""
        warnings.warn(
            "The model's edits stand in a memory with masks, which no state dict and no save_pretrained "
            "holds. Save them with save_memory(model, folder).",
            stacklevel=2,
        )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """The same."""


def put_memory(
    model: nn.Module,
    projection: nn.Module,
    *,
    permutation: Tensor,
    background: Tensor,
    top_k: int,
    threshold: float,
) -> MaskedMemory:
    """Put an empty memory beside a projection of a model; see `MaskedMemory`."""
    remove_memory(model)
    memory = MaskedMemory(projection, permutation, background, top_k, threshold)
    projection.add_module(_NAME, memory)
    projection.register_forward_hook(memory.add_edits)
    model.register_forward_pre_hook(memory.see_pass, with_kwargs=True)
    return memory


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
    for owner, hooks in ((projection, projection._forward_hooks), (model, model._forward_pre_hooks)):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is memory]:
            del hooks[key]
            owner._forward_pre_hooks_with_kwargs.pop(key, None)
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
    if projection is None:
        raise GateError(f"The model has no {about['projection']}. Load the model that was edited.")
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
    """Within the block, a pass's rows have so many tokens of prompt; what follows them is answer."""
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
