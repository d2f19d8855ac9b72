"""Ordinary text, tokenized: what comes with the package, from a file, from a Hugging Face data set, or
written by the model itself.
"""

import random
import re
from collections.abc import Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.files import read_text
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.errors import AnchorError
from easyedit_rls.model.limits import n_positions, refuse_unknown_tokens
from easyedit_rls.model.sampling import sample_texts
from easyedit_rls.model.tokens import encode, start_tokens

SAMPLED_TOKENS = 128  # length of a text sampled from the model
TEXT_TOKENS = 512  # longer texts are cut, and those longer than the model's positions
_BLOCK_TOKENS = 4096
_DATASETS = {  # EasyEdit's short names
    "wikipedia": "wikimedia/wikipedia:20231101.en",
    "wikitext": "Salesforce/wikitext:wikitext-103-raw-v1",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
}


def token_blocks(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: RLSEditHyperParams
) -> Iterator[list[list[int]]]:
    """The text that `mom2_dataset` names, up to `mom2_n_samples` texts, in blocks of some thousand tokens.

    Sampled text is written block by block, so whoever stops early saves the rest.

    Args:
        model: writes the text where the source is 'self'.
        tok: its tokenizer.
        hparams: mom2_dataset, mom2_n_samples, seed.

    Yields:
        rows of token ids, each with the tokenizer's start tokens (`model.tokens.start_tokens`) in front.

    Raises:
        AnchorError: the source can't be read, or has no text.
        ModelError: a token of it is none of the model's.
    """
    source, n = hparams.mom2_dataset, hparams.mom2_n_samples
    if source == "self":
        most = n_positions(model) or SAMPLED_TOKENS + 1
        yield from sample_texts(
            model, tok, n, min(SAMPLED_TOKENS, most - max(1, len(start_tokens(tok)))), hparams.seed
        )
        return
    if source == "shipped":
        texts = _paragraphs(shipped_text(), hparams.seed)
    elif source.endswith(".txt"):
        texts = _paragraphs(read_text(source, AnchorError, "Change mom2_dataset."), hparams.seed)
    else:
        texts = _dataset_texts(source, n, hparams.seed)
    longest = min(
        TEXT_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", TEXT_TOKENS)
    )
    block: list[list[int]] = []
    n_tokens, is_empty = 0, True
    for text in texts[:n]:
        if row := list(encode(tok, text, max_tokens=longest).ids):
            refuse_unknown_tokens(model, tok, [row])
            block.append(row)
            n_tokens, is_empty = n_tokens + len(row), False
        if n_tokens >= _BLOCK_TOKENS:
            yield block
            block, n_tokens = [], 0
    if block:
        yield block
    if is_empty:
        raise AnchorError(
            f"Text source {source} has no text. Give a file with paragraphs, or set mom2_dataset: shipped."
        )


def check_source(source: str) -> None:
    """See that a text file that `mom2_dataset` names can be read, before the long work; other sources are not
    looked at.

    Raises:
        AnchorError: it can't.
    """
    if source.endswith(".txt"):
        read_text(source, AnchorError, "Change mom2_dataset.")


def shipped_text() -> str:
    """The text that comes with the package, written for it: encyclopaedia articles most, and of other kinds
    of English text, of program code and of other languages a little.
    """
    return packaged_text("ordinary_text.txt")


def _paragraphs(text: str, seed: int) -> list[str]:
    """A text's paragraphs, shuffled: neighbors are alike, so the first thousand say little about the rest."""
    texts = [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]
    return random.Random(seed).sample(texts, len(texts))


def _dataset_texts(source: str, n: int, seed: int) -> list[str]:
    try:
        from datasets import load_dataset
    except ImportError as exc:
        raise AnchorError(
            f"mom2_dataset '{source}' needs the datasets package: "
            "pip install 'easyedit-rls[datasets]', or set mom2_dataset: shipped."
        ) from exc
    name, _, config = _DATASETS.get(source, source).partition(":")
    try:
        stream = load_dataset(name, config or None, split="train", streaming=True).shuffle(
            seed=seed, buffer_size=10_000
        )
        texts: list[str] = [record["text"] for record in stream.take(n) if record["text"].strip()]
    except (OSError, ValueError, KeyError) as exc:
        raise AnchorError(
            f"Data set '{source}' can't be loaded: {exc} Check its name, its 'text' column and the network."
        ) from exc
    return texts
