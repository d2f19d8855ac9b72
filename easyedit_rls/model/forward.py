"""Batches of token rows and one way to run them through any decoder."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PADDING = 1.3  # rows that run together differ in length by this factor at most
_LEAST_ROWS = 8  # a product with one or two rows is slow, and its last bits depend on where the weights lie in memory


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    Attributes:
        ids: (rows, length), int64.
        mask: (rows, length), 1 for real tokens; with a cache, (rows, cached + length).
        positions: (rows, length), position of each token in its own row.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device, after: Tensor | None = None) -> Batch:
    """Pad rows of tokens to one length.

    Args:
        rows: token ids.
        side: 'left' or 'right', where the padding goes.
        device: where the tensors go.
        after: mask of cached tokens that come before these, (rows, cached).
    """
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    mask = mask.to(device)
    whole = mask if after is None else torch.cat([after, mask], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -width:]
    return Batch(ids=ids.to(device), mask=whole, positions=positions)


def run(model: nn.Module, batch: Batch, cache: Any = None, use_cache: bool = False) -> Any:
    """Run a batch; positions are passed on where the model takes them (others derive them from the mask)."""
    kwargs: dict[str, Any] = {"attention_mask": batch.mask, "use_cache": use_cache}
    if "position_ids" in inspect.signature(model.forward).parameters:
        kwargs["position_ids"] = batch.positions
    if cache is not None:
        kwargs["past_key_values"] = cache
    return model(input_ids=batch.ids, **kwargs)


def chunks(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut indices into groups of similar length, so that little is spent on padding and no padded group holds more than `max_tokens`.

    A row longer than `max_tokens` makes a group of its own. No other group but the last is smaller than eight rows.
    """
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        is_full = (len(group) + 1) * lengths[i] > max_tokens
        is_unlike = len(group) >= _LEAST_ROWS and lengths[i] > _PADDING * lengths[group[0]]
        if group and (is_full or is_unlike):
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def device_of(model: nn.Module) -> torch.device:
    """Device that the model's inputs go to: its embedding's."""
    return next(model.parameters()).device
