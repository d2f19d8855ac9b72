"""A memory beside one projection, reached through masks of its inputs (MEMOIR, Wang et al. 2025, arXiv
2506.07899, section 3):

    y = W_0 a + W_m (M ⊙ a)

W_0 stays as it is; W_m begins as zeros. Each edit has a mask M of `top_k` inputs, made of its prompt
(*TopHash*): f is the mean of a over the prompt's tokens, less a background mean; the largest |f|, sent
through a fixed permutation π, are the active inputs. A prompt that is asked later has a mask of its own. The
stored mask that shares most with it is used, if it shares at least a threshold; else W_m adds nothing, and
the output is W_0's to the bit. Two prompts that have nothing to do with each other share about top_k / d_k.

What is the prompt? In a pass without a cache, the whole text, unless `prompts_of` tells how much of it; in a
generation, what came before the first new token. The same mask serves all tokens behind it. Several tokens
that come at once behind a cache (a prompt in chunks, the next turn of a talk) are more of the prompt.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from easyedit_rls.errors import GateError, StateMismatchError


@dataclass
class _Asked:
    """The prompts of a pass, and of those that go on behind it.

    Attributes:
        total: sum of the keys of their tokens, (rows, d_k), float32.
        count: of their tokens, (rows,).
        selected: the stored mask of each, (rows, d_k), bool; no input where the memory adds nothing.
    """

    total: Tensor
    count: Tensor
    selected: Tensor


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
        owner: whoever edits it may leave here what it needs to go on.
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
        self.owner: Any = None
        self._written: tuple[float, float] | None = None  # sum and norm of W_m behind the last batch
        self._is_linear = isinstance(projection, nn.Linear)
        # of the pass: (rows, tokens), attention mask, whether it has a cache; None outside one
        self._pass: tuple[tuple[int, int], Tensor | None, bool] | None = None
        self._asked: _Asked | None = None
        self._known: WeakKeyDictionary[Any, _Asked] = WeakKeyDictionary()  # by the cache that goes on

    def masks_of(self, features: Tensor) -> Tensor:
        """Masks of features, (rows, d_k) -> (rows, d_k), bool."""
        active = self.permutation[features.abs().topk(self.top_k, dim=1).indices]
        return torch.zeros_like(features, dtype=torch.bool).scatter_(1, active, True)

    @property
    def selected(self) -> Tensor | None:
        """Of the last prompts, the stored mask of each, (rows, d_k), bool; None before the first."""
        return None if self._asked is None else self._asked.selected

    def see_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's forward pre-hook: a pass's tokens, which are real, and what it goes on behind."""
        given: Any = kwargs.get("input_ids", args[0] if args else None)
        given = kwargs.get("inputs_embeds") if given is None else given
        cache = _cache_in(kwargs)
        goes_on = cache is not None and int(cache.get_seq_length()) > 0
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        self._pass = (int(given.shape[0]), int(given.shape[1])), mask, goes_on
        self._asked = self._known.get(cache) if goes_on else None

    def end_pass(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The model's forward hook: remember what was asked, for passes that go on behind this one."""
        for cache in (getattr(output, "past_key_values", None), _cache_in(kwargs)):
            if cache is not None and self._asked is not None:
                self._known[cache] = self._asked
        self._pass = None

    def add_edits(self, projection: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The projection's forward hook: output with what W_m adds, of the same shape and type.

        Raises:
            GateError: only a part of the model runs; the pass goes on behind prompts that were not asked
                here; or its mask is not one of padding.
        """
        if self.forced is None and not len(self.masks):
            return output
        if self._pass is None:
            raise GateError(
                "A part of the model runs by itself, so its prompts are not known. Call the model."
            )
        keys = args[0].reshape(*self._pass[0], -1)  # some models flatten rows and tokens before the MLP
        whole = output.reshape(*self._pass[0], -1)
        if self.forced is not None:
            whole = whole + self._part(keys, self.forced.expand(len(keys), -1), output)
        else:
            self._asked = self._ask(keys)
            whole = self._open(keys, self._asked.selected, whole)
        return whole.reshape(output.shape)

    def _open(self, keys: Tensor, selected: Tensor, output: Tensor) -> Tensor:
        """The output, (rows, length, d_v), with W_m's part in the rows that have a mask; the others' is left
        alone.
        """
        is_open = selected.any(1)
        if keys.device.type != "cpu":  # no waiting for what is open
            return torch.where(is_open[:, None, None], output + self._part(keys, selected, output), output)
        if not bool(is_open.any()):
            return output
        output = output.clone()
        output[is_open] += self._part(keys[is_open], selected[is_open], output)
        return output

    @contextmanager
    def batch(self) -> Iterator[None]:
        """What the block does to the memory is a batch; if it fails, the memory is as it was. Where somebody
        put W_m back to what it was before the last batch, that batch's masks go first.

        Raises:
            StateMismatchError: W_m is neither what the last batch left nor what it found.
        """
        self._follow_weight()
        found = self.weight.detach().clone(), len(self.masks)
        try:
            yield
            self.before, self._written = found, self._mark()
        except BaseException:
            self.weight.data.copy_(found[0])
            self.masks = self.masks[: found[1]]
            raise
        finally:
            self.forced = None

    def _follow_weight(self) -> None:
        if self._written is None or self._mark() == self._written:
            return
        if self.before is None or not torch.equal(self.weight, self.before[0]):
            raise StateMismatchError(
                "The memory's weight is not what the last batch left. Put it back, or take the memory off: "
                "remove_memory(model)."
            )
        self.masks, self.before, self._written = self.masks[: self.before[1]], None, self._mark()

    def _mark(self) -> tuple[float, float]:
        return float(self.weight.sum(dtype=torch.float64)), float(self.weight.norm())

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
        self.before, self._written = None, self._mark()

    def _ask(self, keys: Tensor) -> _Asked:
        """What the rows of a pass ask, keys (rows, length, d_k)."""
        assert self._pass is not None
        (rows, length), mask, goes_on = self._pass
        known = self._asked
        if goes_on and (known is None or len(known.count) != rows):
            raise GateError(
                "A pass goes on behind prompts that did not run with this memory. Run them first."
            )
        if known is not None and length == 1:
            return known
        is_prompt = torch.ones(rows, length, dtype=torch.bool, device=keys.device)
        if mask is not None:
            if mask.dim() != 2:
                raise GateError("A memory with masks reads prompts. Give each its own row, padded.")
            is_prompt = mask[:, -length:].to(keys.device).bool()
        if self.told is not None:
            is_prompt = is_prompt & (is_prompt.cumsum(1) <= self.told.to(keys.device)[:, None])
        total, count = _summed(keys, is_prompt)
        if known is not None:
            total, count = total + known.total, count + known.count
        features = total / count.clamp(min=1)[:, None] - self.background
        shared = self.masks_of(features).float() @ self.masks.float().T / self.top_k
        self.overlap, nearest = shared.max(1)
        return _Asked(total, count, self.masks[nearest] & (self.overlap >= self.threshold)[:, None])

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
        self.before = None if self.before is None else (self.before[0].to(device), self.before[1])
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


def prompt_means(keys: Tensor, is_prompt: Tensor) -> Tensor:
    """Mean key of each prompt, keys (rows, length, d_k), is_prompt (rows, length) -> (rows, d_k), float32; f
    is that less the background.
    """
    total, count = _summed(keys, is_prompt)
    return total / count.clamp(min=1)[:, None]


def _summed(keys: Tensor, is_prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of prompts' keys, (rows, length, d_k) -> (rows, d_k), float32, and how many there are, (rows,)."""
    is_prompt = is_prompt.to(keys.device)
    return torch.einsum("rl,rlk->rk", is_prompt.float(), keys.float()), is_prompt.sum(1)


def _cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The key-value cache that a pass was given; transformers 5.24 renamed it."""
    cache = kwargs.get("cache")
    return kwargs.get("past_key_values") if cache is None else cache
