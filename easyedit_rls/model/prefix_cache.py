"""The common of texts, run once and kept in the model's own key-value cache."""

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
        self._found = _run_prefixes(model, end, unlike, batch_tokens) if any(unlike) else None
        self._widths = [] if self._found is None else _widths(self._found[1])

    def select(self, texts: Sequence[tuple[int, ...]]) -> tuple[DynamicCache | None, Tensor | None]:
        """One cache with a row for each text, and its mask, (rows, cached); (None, None) if the texts have no
        token at all.
        """
        if self._found is None or not any(texts):
            return None, None
        whole, whole_mask = self._found
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
    model: PreTrainedModel, end: nn.Module, prefixes: Sequence[Sequence[int]], batch_tokens: int
) -> tuple[DynamicCache, Tensor]:
    """A cache with a row for each prefix, padded on the left, and its mask."""
    device = device_of(model)
    shared = share_prefixes(prefixes, device)
    rests, common = prefixes, DynamicCache(config=model.config)
    if shared is not None:
        rests = [prefix[n:] for prefix, n in zip(prefixes, shared.lengths)]
        with tap(outputs={"end": end}, stop=True):
            run(model, shared.texts, cache=common, use_cache=True)
    parts = []
    for group in pack_batches([len(rest) for rest in rests], batch_tokens, pass_overhead(device)):
        cache, mask = DynamicCache(config=model.config), None
        if shared is not None:
            cache, mask = fork(common), shared.mask[group]
            cache.batch_select_indices(shared.numbers[group])
        if any(rests[i] for i in group):
            batch = pad([rests[i] for i in group], "left", device, after=mask)
            with tap(outputs={"end": end}, stop=True):
                run(model, batch, cache=cache, use_cache=True)
            mask = batch.mask
        if mask is not None:
            parts.append((group, cache, mask))
    return _merged(parts, len(prefixes), model)


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
        texts: the common, each once.
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
