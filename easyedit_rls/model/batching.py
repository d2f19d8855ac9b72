"""Batches of token rows and one way to run them through any decoder."""

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from easyedit_rls.errors import LayoutError

_PASS = 20  # tokens that a pass costs as much as beside its own: small products run at less than full speed
# in types of two bytes or on a GPU, where multiplying takes less time, and getting ready for it as much
_PASS_OF_FAST_PRODUCTS = 250
_LEAST_ROWS = (
    8  # a product with one or two rows is slow, and its last bits depend on where the weights lie in memory
)


@dataclass(frozen=True)
class Batch:
    """Padded rows.

    Attributes:
        ids: (rows, length), int64.
        mask: (rows, length), 1 for real tokens; with a cache, (rows, cached + length); or (rows, 1, length,
            length), what each sees.
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
    before = [width - len(row) if side == "left" else 0 for row in rows]
    ids = torch.tensor(
        [[0] * n + [*row] + [0] * (width - n - len(row)) for n, row in zip(before, rows)], dtype=torch.long
    )
    mask = torch.tensor(
        [[0] * n + [1] * len(row) + [0] * (width - n - len(row)) for n, row in zip(before, rows)],
        dtype=torch.long,
    )
    mask = mask.to(device)
    whole = mask if after is None else torch.cat([after, mask], dim=1)
    positions = (whole.cumsum(1) - 1).clamp(min=0)[:, -width:]
    return Batch(ids=ids.to(device), mask=whole, positions=positions)


def takes_positions(model: nn.Module) -> bool:
    """Whether a model can be told each token's position."""
    return _takes(model, "position_ids")


def _takes(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def positions_follow_mask(model: PreTrainedModel) -> bool:
    """Whether padding between two tokens leaves their distance as it is: told by position_ids, or seen in a
    pass of three tokens.
    """
    if takes_positions(model):
        return True
    device = device_of(model)
    with torch.no_grad():
        plain = model(torch.tensor([[1, 2, 3]], device=device)).logits[0, -1]
        padded = model(
            torch.tensor([[1, 2, 0, 0, 3]], device=device),
            attention_mask=torch.tensor([[1, 1, 0, 0, 1]], device=device),
        ).logits
    return torch.allclose(
        plain.float(), padded[0, -1].float(), rtol=0.0, atol=0.02 * float(plain.float().abs().max())
    )


def run(model: PreTrainedModel, batch: Batch, cache: Any = None, use_cache: bool = False) -> Any:
    """Run a batch; positions are passed on where the model takes them (others derive them from the mask).

    Raises:
        LayoutError: with a cache, rows as long as the model's sliding window, which would count their
            padding.
    """
    window = window_of(model)
    if cache is not None and window is not None and batch.mask.shape[1] > window:
        raise LayoutError(
            f"A text takes {batch.mask.shape[1]} tokens with its padding; "
            f"the model's sliding window is {window}. Shorten the prompts or templates."
        )
    kwargs: dict[str, Any] = {"attention_mask": batch.mask, "use_cache": use_cache}
    if takes_positions(model):
        kwargs["position_ids"] = batch.positions
    if cache is not None:
        kwargs["cache" if _takes(model, "cache") else "past_key_values"] = (
            cache  # transformers 5.24 renamed it
        )
    return model(input_ids=batch.ids, **kwargs)


def logits_at(model: PreTrainedModel, batch: Batch, places: Sequence[tuple[int, int]]) -> Tensor:
    """Run a batch; the logits at these (row, position) alone, (places, vocabulary)."""
    which, where = (torch.tensor(column, device=batch.ids.device) for column in zip(*places))

    def pick(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][which, where][None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        logits: Tensor = run(model, batch).logits[0]
    finally:
        hook.remove()
    return logits


def window_of(model: PreTrainedModel) -> int | None:
    """How many tokens back a token sees at least, in the layer where that is the fewest; None where it sees
    all.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=None)


def pass_overhead(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """Tokens that a pass costs as much as beside its own. Measured on the CPU; a GPU's is the one of two-byte
    types, unmeasured.
    """
    return _PASS if device.type == "cpu" and dtype.itemsize > 2 else _PASS_OF_FAST_PRODUCTS


def pack_batches(lengths: Sequence[int], max_tokens: int, price: int = _PASS) -> Iterator[list[int]]:
    """Cut indices into groups of similar length, so that passes and padding together cost the least, and no
    padded group holds more than `max_tokens`.

    A row longer than `max_tokens` makes a group of its own.

    Args:
        lengths: tokens of each row.
        max_tokens: tokens in one pass, at most.
        price: what a pass costs beside its tokens, in tokens; see `pass_overhead`.
    """
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    ends = [k + 1 for k, i in enumerate(order) if k + 1 == len(order) or lengths[order[k + 1]] != lengths[i]]
    start = 0
    for end in _cuts([lengths[order[end - 1]] for end in ends], ends, max_tokens, price):
        most = max(1, max_tokens // max(1, lengths[order[end - 1]]))
        n_parts = math.ceil((end - start) / most)
        places = [start + (end - start) * part // n_parts for part in range(n_parts + 1)]
        yield from (order[first:last] for first, last in pairwise(places))
        start = end


def _cuts(widths: Sequence[int], ends: Sequence[int], max_tokens: int, price: int) -> list[int]:
    """Where to cut sorted rows, by dynamic programming: of all cuts between rows unlike in length, those of
    the least cost.

    Args:
        widths: the lengths that occur, rising.
        ends: for each, the number of rows up to that length.
        max_tokens: tokens in one pass, at most.
        price: of a pass, in tokens.
    """
    starts = [0, *ends]
    costs, before = [0.0], [0]
    for k, width in enumerate(widths):
        found = []
        for j in range(k + 1):
            n_rows = ends[k] - starts[j]
            if n_rows >= _LEAST_ROWS or k == len(widths) - 1:
                tokens = n_rows * width
                found.append((costs[j] + tokens + price * math.ceil(tokens / max_tokens), j))
        cost, j = min(found, default=(math.inf, 0))
        costs.append(cost)
        before.append(j)
    cuts, k = [], len(widths)
    while k:
        cuts.append(starts[k])
        k = before[k]
    return cuts[::-1]


def device_of(model: nn.Module) -> torch.device:
    """Device that the model's inputs go to: its embedding's."""
    return next(model.parameters()).device
