"""Text sampled from the model itself, leaving the caller's random state as it was."""

from collections.abc import Iterator
from itertools import cycle

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.model.batching import device_of
from easyedit_rls.model.generation import sampled, write_on
from easyedit_rls.model.limits import n_token_rows
from easyedit_rls.model.tokens import encode, start_tokens

_OPENINGS = ("The", "Therefore", "Because", "I", "You")  # MEMIT's
_TEMPLATE_TOKENS = 10
_ROWS_AT_ONCE = 64


def sample_templates(model: PreTrainedModel, tok: PreTrainedTokenizerBase, n: int, seed: int) -> list[str]:
    """Short texts to put before a prompt, as MEMIT has them: an opening word, ten sampled tokens, a full
    stop.

    Args:
        model: any decoder with `generate`.
        tok: its tokenizer.
        n: how many; MEMIT takes five.
        seed: same seed, same texts.
    """
    texts = []
    for i, opening in zip(range(n), cycle(_OPENINGS)):
        row = encode(tok, opening).ids
        (ids,) = _sample(model, tok, torch.tensor([row]), _TEMPLATE_TOKENS, seed + i, top_k=5)
        text = " ".join(
            tok.decode(ids, skip_special_tokens=True).replace("{", " ").replace("}", " ").split()
        )  # {} marks places
        texts.append(f"{text.rstrip('.')}. ")
    return texts


def sample_texts(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, n_texts: int, n_tokens: int, seed: int
) -> Iterator[list[list[int]]]:
    """Token rows the model writes by itself at temperature 1, from its start token; without one, each from a
    random first token.

    What a model writes from its start token alone is drawn from what it takes for ordinary text. Without a
    start token, random first tokens keep the texts varied, as LLM-QAT (arXiv 2305.17888) found for
    calibration without data. In a vocabulary of many languages they begin texts in all of these, which says
    little about the one that is edited.

    Args:
        model: any decoder with `generate`.
        tok: its tokenizer.
        n_texts: how many rows.
        n_tokens: tokens sampled for each.
        seed: same seed, same texts.

    Yields:
        some rows at a time, sampled when they are asked for.
    """
    start = torch.tensor([start_tokens(tok)] * n_texts, dtype=torch.long).reshape(n_texts, -1)
    if not start.shape[1]:
        special = set(tok.all_special_ids)
        ordinary = torch.tensor([i for i in range(min(len(tok), n_token_rows(model))) if i not in special])
        generator = torch.Generator().manual_seed(seed)
        start = ordinary[torch.randint(len(ordinary), (n_texts, 1), generator=generator)]
    for at in range(0, n_texts, _ROWS_AT_ONCE):
        yield _sample(model, tok, start[at : at + _ROWS_AT_ONCE], n_tokens, seed + 1 + at)


def _sample(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    prompt: torch.Tensor,
    n_tokens: int,
    seed: int,
    top_k: int = 0,
) -> list[list[int]]:
    device = device_of(model)
    config = sampled(
        model,
        tok,
        max_new_tokens=n_tokens,
        min_new_tokens=n_tokens,
        top_k=top_k,
        suppress=tok.all_special_ids,
    )
    prompt = prompt.to(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = write_on(model, tok, prompt, torch.ones_like(prompt), config)
    rows: list[list[int]] = out.tolist()
    return rows
