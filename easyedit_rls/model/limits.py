"""What of a text a model can take: as many tokens as it has positions,
and only those that its embedding has.
"""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.errors import ModelError, RequestError

_SPARE_ROWS = 2  # OPT's table begins with two rows that stand for no position


def n_positions(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have at most; None where positions are not looked up in a table, and so
    don't end.

    A table is an embedding beside the input's (learned positions: GPT-2, OPT), or a buffer alone in its
    module (precomputed rotations: GPT-J), with as many rows as the config has positions. Two such buffers, a
    cosine's and a sine's, grow with the text.
    """
    most: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    tokens = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            if module.num_embeddings in (most, most + _SPARE_ROWS):
                return most
            continue
        tables = [buffer for buffer in module._buffers.values() if buffer is not None and buffer.dim() == 2]
        tables = [table for table in tables if len(table) == most and table.is_floating_point()]
        if len(tables) == 1:
            return most
    return None


def n_token_rows(model: PreTrainedModel) -> int:
    """Rows of the model's input embedding: ids from there on are no token that it knows."""
    rows: int = model.get_input_embeddings().weight.shape[0]
    return rows


def refuse_unknown_tokens(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    numbers: Sequence[int] | None = None,
) -> None:
    """See that the embedding has a row for every token that occurs; elsewhere one that it lacks does no harm.

    Args:
        model: the model.
        tok: its tokenizer.
        rows: token ids.
        numbers: for errors, the number of the request that each belongs to; None where they belong to none.

    Raises:
        ModelError: names the first such token, its id, the embedding's rows, and the request.
    """
    known = n_token_rows(model)
    for at, row in enumerate(rows):
        if (largest := max(row, default=0)) >= known:
            where = "" if numbers is None else f" of request {numbers[at]}"
            raise ModelError(
                f"Token {tok.convert_ids_to_tokens(largest)!r}{where} has id {largest}, "
                "but the model's embedding has "
                f"{known} rows. Call model.resize_token_embeddings(len(tok)) first, "
                "or load the tokenizer that came with the model."
            )


def refuse_unfit(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    numbers: Sequence[int] | None = None,
    *,
    what: str = "The prompt with its answer",
    cure: str = "Shorten it.",
    n_new: int = 0,
) -> None:
    """See that rows of tokens can run through the model: no unknown token, and a position for each.

    Args:
        model: the model.
        tok: its tokenizer.
        rows: token ids.
        numbers: for errors, the number of the request that each belongs to; None: each its own.
        what: what a row is, for errors.
        cure: a sentence.
        n_new: tokens that the model shall predict behind a row; the last of all is not run, and needs no
            position.

    Raises:
        RequestError: a row is too long; names the request, its tokens and the model's positions.
        ModelError: see `refuse_unknown_tokens`.
    """
    refuse_unknown_tokens(model, tok, rows, range(len(rows)) if numbers is None else numbers)
    most = n_positions(model)
    if most is None:
        return
    for at, row in enumerate(rows):
        if len(row) + n_new - 1 > most:
            raise RequestError(
                f"{what} has {len(row) + n_new} tokens, but the model has {most} positions. {cure}",
                index=at if numbers is None else numbers[at],
            )
