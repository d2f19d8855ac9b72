"""Perplexity on plain text."""

import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.arguments import text as checked_text
from easyedit_rls._base.progress import progress_bar
from easyedit_rls.errors import RequestError
from easyedit_rls.model.batching import device_of, pad, run
from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.limits import n_positions, refuse_unknown_tokens
from easyedit_rls.model.tokens import encode, start_tokens


def perplexity(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int = 256,
    max_tokens: int = 8192,
    batch_tokens: int = 2048,
    show_progress: bool | None = None,
) -> float:
    """exp of the mean next-token negative log-likelihood, over windows that don't overlap.

    The tokenizer's start tokens come before each window. Each window's first token is not counted, with start
    tokens or without.

    Args:
        model: the model.
        tok: its tokenizer.
        text: plain text.
        window: tokens of the text a window.
        max_tokens: how much of the text to use.
        batch_tokens: tokens in one pass, at most.
        show_progress: None shows a bar on a terminal only.

    Raises:
        ArgumentError: the text is none.
        RequestError: the text has fewer than two tokens, or a window is longer than the model's table of
            positions.
        ModelError: a token is none of the model's.
    """
    start, most = start_tokens(tok), n_positions(model)
    if most is not None and window + len(start) > most:
        room = most - len(start)
        raise RequestError(
            f"is {window}, but the model has positions for {room} tokens of a text. Lower it.", field="window"
        )
    own = encode(tok, checked_text(text, "text"), with_start=False).ids
    ids = own[len(start) if own[: len(start)] == start else 0 :][:max_tokens]
    rows = [
        row for at in range(0, len(ids), window) if len(row := start + ids[at : at + window]) > len(start) + 1
    ]
    refuse_unknown_tokens(model, tok, rows)
    if not rows:
        raise RequestError(
            "has fewer than two tokens, so there is nothing to predict. Give more text.", field="text"
        )
    total, count, step = 0.0, 0, max(1, batch_tokens // window)
    with undisturbed(model), progress_bar(len(rows), "perplexity", "window", show_progress) as bar:
        for at in range(0, len(rows), step):
            some = rows[at : at + step]
            batch = pad(some, "right", device_of(model))
            logits = run(model, batch).logits[:, :-1].float()
            targets = batch.ids[:, 1:].masked_fill(batch.mask[:, 1:] == 0, -100)
            targets[:, : len(start)] = -100
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100
                )
            )
            count += sum(len(row) - len(start) - 1 for row in some)
            bar.update(len(some))
    return math.exp(total / count)
