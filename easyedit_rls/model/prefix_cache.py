"""Prefixes shared by means of a cache: what several rows begin with runs once, into the model's own key-value
cache, and the rest of each row runs behind its copy.

(`prefix_tree` shares in one pass instead, without a cache, which suits texts that are run only once.)
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from easyedit_rls._base.common_prefix import common_prefix
from easyedit_rls.model.batching import Batch, device_of, pack_batches, pad, pass_overhead, run
from easyedit_rls.model.hooks import tap

# tokens; sharing fewer saves little, and rows that differ after them would be kept apart from closer ones
_LEAST_SHARED = 5


@dataclass(frozen=True)
class Group:
    """Rows of like length that run together.

    Attributes:
        rows: their numbers.
        batch: what they have behind their shared prefixes, padded on the left; its mask covers both.
        numbers: for each row, which shared prefix is its own, (rows,); None if there are none.
    """

    rows: list[int]
    batch: Batch
    numbers: Tensor | None


class SharedPrefixes:
    """Rows of tokens, cut behind what several of them begin with, which stands in a cache.

    Args:
        model: the model.
        rows: token ids.
        batch_tokens: tokens in one pass, at most.
        end: decoder layer after which the pass of the shared prefixes may stop.
        n_own: so many tokens at the end of each row are never shared.

    Attributes:
        groups: the rows, in groups of like length.
        texts: the shared prefixes, each once; None if sharing saves nothing.
        cache: the texts, a row each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Sequence[Sequence[int]],
        batch_tokens: int,
        end: nn.Module,
        n_own: int = 0,
    ) -> None:
        device = device_of(model)
        shared = share_prefixes([row[: len(row) - n_own] for row in rows], device)
        rests = rows if shared is None else [row[n:] for row, n in zip(rows, shared.lengths)]
        self.groups = []
        for group in pack_batches([len(rest) for rest in rests], batch_tokens, pass_overhead(device)):
            mask, numbers = (None, None) if shared is None else (shared.mask[group], shared.numbers[group])
            self.groups.append(Group(group, pad([rests[i] for i in group], "left", device, mask), numbers))
        self.texts = None if shared is None else shared.texts
        self.cache = DynamicCache(config=model.config)
        if shared is not None:
            with torch.no_grad(), tap(outputs={"end": end}, stop=True):
                run(model, shared.texts, cache=self.cache, use_cache=True)

    def cache_of(self, group: Group) -> DynamicCache | None:
        """The shared prefixes of a group's rows, in a cache that grows on its own; None if there are none."""
        if group.numbers is None:
            return None
        cache = fork(self.cache)
        cache.batch_select_indices(group.numbers)
        return cache


class PrefixCache:
    """The key-value caches of texts; each text runs once, and what several texts begin with runs once.

    Args:
        model: the model.
        end: decoder layer after which the pass may stop.
        texts: token ids; may be empty.
        batch_tokens: tokens in one pass, at most.
    """

    def __init__(
        self, model: PreTrainedModel, end: nn.Module, texts: Iterable[tuple[int, ...]], batch_tokens: int
    ) -> None:
        self._config = model.config
        unlike = sorted(texts)
        self._number = {text: i for i, text in enumerate(unlike)}
        self._whole = _run_prefixes(model, end, unlike, batch_tokens) if any(unlike) else None
        self._widths = [] if self._whole is None else _widths(self._whole[1])

    def select(self, texts: Sequence[tuple[int, ...]]) -> tuple[DynamicCache | None, Tensor | None]:
        """One cache with a row for each text, and its mask, (rows, cached); (None, None) if the texts have no
        token at all.
        """
        if self._whole is None or not any(texts):
            return None, None
        whole, whole_mask = self._whole
        rows = torch.tensor(
            [self._number[text] for text in texts]
        )  # on the CPU: layers may lie on several devices
        mask = whole_mask[rows]
        width = max(self._widths[self._number[text]] for text in texts)
        cache = DynamicCache(config=self._config)
        for number, layer in enumerate(whole.layers):
            if layer.is_initialized:
                cache.update(layer.keys[rows, :, -width:], layer.values[rows, :, -width:], number)
        return cache, mask[:, -width:]


def _widths(mask: Tensor) -> list[int]:
    """Columns from each row's first token to the end; 0 for a row without any."""
    has_begun = mask.cummax(1).values
    widths: list[int] = has_begun.sum(1).tolist()
    return widths


def _run_prefixes(
    model: PreTrainedModel, end: nn.Module, texts: Sequence[Sequence[int]], batch_tokens: int
) -> tuple[DynamicCache, Tensor]:
    """A cache with a row for each text, padded on the left, and its mask."""
    prefixes, parts = SharedPrefixes(model, texts, batch_tokens, end), []
    for group in prefixes.groups:
        cache = prefixes.cache_of(group)
        cache = DynamicCache(config=model.config) if cache is None else cache
        if group.batch.ids.shape[1]:
            with tap(outputs={"end": end}, stop=True):
                run(model, group.batch, cache=cache, use_cache=True)
        if group.batch.mask.shape[1]:
            parts.append((group.rows, cache, group.batch.mask))
    return _merged(parts, len(texts), model)


def _merged(
    parts: Sequence[tuple[list[int], DynamicCache, Tensor]], n_rows: int, model: PreTrainedModel
) -> tuple[DynamicCache, Tensor]:
    """One cache of the caches of groups of rows, padded on the left to one length."""
    width = max(mask.shape[1] for _, _, mask in parts)
    mask = parts[0][2].new_zeros(n_rows, width)
    for group, _, part in parts:
        mask[group, width - part.shape[1] :] = part
    whole = DynamicCache(config=model.config)
    for number, layer in enumerate(parts[0][1].layers):
        if layer.is_initialized:
            states = []
            for name in ("keys", "values"):
                _, n_heads, _, d_head = getattr(layer, name).shape
                state = getattr(layer, name).new_zeros(n_rows, n_heads, width, d_head)
                for group, cache, _ in parts:
                    part = getattr(cache.layers[number], name)
                    state[group, :, width - part.shape[2] :] = part
                states.append(state)
            whole.update(*states, number)
    return whole, mask


@dataclass(frozen=True)
class Shared:
    """What rows of tokens begin with together.

    Attributes:
        texts: these prefixes, each once.
        lengths: for each row, how many of its tokens they hold; 0 where it shares nothing.
        numbers: for each row, which text is its own, (rows,), on the CPU; any where it shares nothing.
        mask: for each row, which of the text's tokens it sees, (rows, length).
    """

    texts: Batch
    lengths: list[int]
    numbers: Tensor
    mask: Tensor


def share_prefixes(rows: Sequence[Sequence[int]], device: torch.device) -> Shared | None:
    """Find what rows begin with together, None where sharing saves nothing.

    Rows with the same first few tokens are taken for a family, and what all of a family begin with is shared.
    """
    families: dict[tuple[int, ...], list[int]] = {}
    for i, row in enumerate(rows):
        if len(row) >= _LEAST_SHARED:
            families.setdefault(tuple(row[:_LEAST_SHARED]), []).append(i)
    lengths, numbers = [0] * len(rows), [0] * len(rows)
    texts: list[Sequence[int]] = []
    for family in families.values():
        if len(family) > 1:
            same = common_prefix([rows[i] for i in family])
            for i in family:
                lengths[i], numbers[i] = same, len(texts)
            texts.append(rows[family[0]][:same])
    if not texts:
        return None
    batch = pad(texts, "left", device)
    shares = torch.tensor(lengths, device=device).clamp(max=1)
    return Shared(batch, lengths, torch.tensor(numbers), batch.mask[numbers] * shares[:, None])


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that starts with the same tensors and grows on its own (growing makes new tensors, so nothing
    is copied).
    """
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked
