"""The one place that lets a model write, under settings that are ours alone.

`generate` fills every setting that its caller left open from the model's own `generation_config`, so a folder
that ships a repetition penalty, beams or stop strings would change what is called greedy. Here that object is
put aside while the model writes. Only the tokens that end a text are still the model's own.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.limits import n_token_rows


def greedy(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    stops: Sequence[str] = (),
) -> GenerationConfig:
    """Settings under which each token is the most probable one.

    Args:
        model: the model that will write.
        tok: its tokenizer.
        max_new_tokens: tokens to write, at most.
        min_new_tokens: tokens to write, at least; None lets the text end at once.
        stops: a text ends behind the first of these.
    """
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        stop_strings=list(stops) or None,
        **_ends(model, tok),
    )


def sampled(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    min_new_tokens: int | None = None,
    top_k: int = 0,
    suppress: Sequence[int] = (),
    stops: Sequence[str] = (),
) -> GenerationConfig:
    """Settings under which each token is drawn from the model's own distribution, at temperature 1.

    Args:
        model: the model that will write.
        tok: its tokenizer.
        max_new_tokens: tokens to write, at most.
        min_new_tokens: tokens to write, at least; None lets the text end at once.
        top_k: draw from so many of the most probable tokens; 0 draws from all.
        suppress: tokens that are never drawn.
        stops: a text ends behind the first of these.
    """
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        suppress_tokens=sorted(suppress) or None,
        stop_strings=list(stops) or None,
        **_ends(model, tok),
    )


def write_on(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, ids: Tensor, mask: Tensor, config: GenerationConfig
) -> Tensor:
    """Let the model go on from rows of tokens.

    Args:
        model: any decoder with `generate`.
        tok: its tokenizer, which stop strings are looked up in.
        ids: (rows, length), long, padded on the left.
        mask: (rows, length), 1 where `ids` is text.
        config: from `greedy` or `sampled`.

    Returns:
        The rows with what was written behind them, (rows, length + new), long; short rows end in pad tokens.
    """
    with undisturbed(model), plain_generation(model):
        out: Tensor = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            **({"tokenizer": tok} if config.stop_strings else {}),
        )
    return out


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model's generation settings say only where a text ends;
    then its own are put back.
    """
    own = model.generation_config
    try:
        model.generation_config = GenerationConfig(
            **{}
            if own is None
            else {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        )
        yield
    finally:
        model.generation_config = own


def _ends(model: PreTrainedModel, tok: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The model's own end tokens, else the tokenizer's, and a token to fill up with behind them.

    What is filled up with runs through the model too, so a pad token that only the tokenizer knows won't do:
    an end token does then, which nobody reads either.
    """
    own = None if model.generation_config is None else model.generation_config.eos_token_id
    ends = tok.eos_token_id if own is None else own
    known = range(n_token_rows(model))
    fillers = [
        token
        for token in (tok.pad_token_id, *(ends if isinstance(ends, list) else [ends]), 0)
        if token in known
    ]
    return {"eos_token_id": ends, "pad_token_id": fillers[0]}
