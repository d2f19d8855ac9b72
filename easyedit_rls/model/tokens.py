"""The one place where texts become tokens: for editing, scores, windows, moments, sampled text and generation
alike.

A text's tokens are its own, with the tokens in front that the tokenizer's post-processor puts in front: a
start token, where the model knows one. What a post-processor appends stays out: nothing could be said behind
an end token.

What is said behind a prompt never changes the prompt's own tokens, since generation runs behind those. Often
the tokens of both together begin with the prompt's. Where they don't (a token would reach over the border, as
in "是小" or in a newline with the indent behind it), what is behind is cut by itself, and has to read as what
it is.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from easyedit_rls.errors import LayoutError, RequestError

_SAMPLE = "a"
_NEUTRAL = (
    "",
    "\n",
    "0",
    ".",
    "a",
    "。",
    '"',
)  # texts to cut a continuation behind; SentencePiece puts a space before the very first word


@dataclass(frozen=True)
class Encoded:
    """A text's tokens.

    Attributes:
        ids: start tokens and the text's own.
        offsets: where in the text each of them stands, (first character, one past the last); (0, 0) for a
            start token.
        n_start: how many start tokens come before the text's own.
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    n_start: int


def start_tokens(tok: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that the tokenizer puts in front of every text; often one, or none."""
    return _added(tok)[0]


def end_tokens(tok: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that the tokenizer would append to every text, and that `encode` leaves out."""
    return _added(tok)[1]


def encode(
    tok: PreTrainedTokenizerBase, text: str, *, with_start: bool = True, max_tokens: int | None = None
) -> Encoded:
    """A text's tokens.

    Args:
        tok: a fast tokenizer.
        text: as it is.
        with_start: whether the start tokens come in front, unless the text itself begins with them.
        max_tokens: how many to keep, start tokens included; all if None.

    Raises:
        LayoutError: the tokenizer gives no character offsets.
    """
    return encode_all(tok, [text], with_start=with_start, max_tokens=max_tokens)[0]


def encode_all(
    tok: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    with_start: bool | Sequence[bool] = True,
    max_tokens: int | None = None,
) -> list[Encoded]:
    """The tokens of many texts, by one call of the tokenizer; see `encode`. `with_start` may differ from text
    to text.
    """
    if not texts:
        return []
    if not tok.is_fast:
        raise LayoutError(
            f"{type(tok).__name__} gives no character offsets. Load the fast tokenizer (use_fast=True)."
        )
    found = tok(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        truncation=False,
        padding=False,
        verbose=False,
    )
    wanted = [with_start] * len(texts) if isinstance(with_start, bool) else with_start
    start = start_tokens(tok) if any(wanted) else ()
    encoded = []
    for own, offsets, is_wanted in zip(found["input_ids"], found["offset_mapping"], wanted, strict=True):
        front = start if is_wanted and tuple(own[: len(start)]) != start else ()
        ids, places = (*front, *own), (*((0, 0) for _ in front), *map(tuple, offsets))
        encoded.append(Encoded(ids[:max_tokens], places[:max_tokens], len(front)))
    return encoded


def continue_with(
    tok: PreTrainedTokenizerBase, encoded: Encoded, prompt: str, continuation: str
) -> tuple[int, ...]:
    """The tokens of a continuation behind a prompt whose own tokens stay as they are.

    Args:
        tok: a fast tokenizer.
        encoded: the prompt's tokens.
        prompt: its text.
        continuation: the text that follows at once.

    Returns:
        the continuation's tokens; none if it is empty.

    Raises:
        RequestError: the tokenizer has no tokens that read as the continuation there.
    """
    return continue_all(tok, [(encoded, prompt, continuation)])[0]


def continue_all(
    tok: PreTrainedTokenizerBase, parts: Sequence[tuple[Encoded, str, str]]
) -> list[tuple[int, ...]]:
    """The tokens of many continuations, as `continue_with` gives them, by one call of the tokenizer where
    that is enough.

    Raises:
        RequestError: see `continue_with`; its index is the number of the part.
    """
    together = encode_all(tok, [prompt + continuation for _, prompt, continuation in parts], with_start=False)
    found = []
    for number, ((encoded, prompt, continuation), whole) in enumerate(zip(parts, together)):
        own = encoded.ids[encoded.n_start :]
        if whole.ids[: len(own)] == own:
            found.append(whole.ids[len(own) :])
            continue
        try:
            found.append(_cut_alone(tok, own, prompt, continuation, whole.ids))
        except RequestError as exc:
            raise exc.at(number) from None
    return found


def _cut_alone(
    tok: PreTrainedTokenizerBase, own: tuple[int, ...], prompt: str, continuation: str, whole: tuple[int, ...]
) -> tuple[int, ...]:
    """The continuation's tokens as they are behind some other text, if they read as the continuation behind
    the prompt's tokens too.
    """
    meant = _read(tok, whole)
    behind = encode_all(tok, [text + continuation for text in _NEUTRAL], with_start=False)
    alone = encode_all(tok, _NEUTRAL, with_start=False)
    for other, both in zip(alone, behind):
        rest = both.ids[len(other.ids) :]
        if both.ids[: len(other.ids)] == other.ids and _read(tok, (*own, *rest)) == meant:
            return rest
    raise RequestError(
        f"{continuation!r} has no tokens of its own behind {prompt!r}. "
        "Choose another wording, or set its joint to a space."
    )


def _read(tok: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of tokens, NFC: some tokenizers compose characters, which they can't do over the border."""
    return unicodedata.normalize(
        "NFC", tok.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _added(tok: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer's post-processor puts before and behind a text."""
    own, whole = (tuple(tok(_SAMPLE, add_special_tokens=is_whole)["input_ids"]) for is_whole in (False, True))
    for at in range(len(whole) - len(own) + 1):
        if whole[at : at + len(own)] == own:
            return whole[:at], whole[at + len(own) :]
    raise LayoutError(
        f"{type(tok).__name__} changes a text's own tokens by its special ones. "
        "Load the tokenizer that the model came with."
    )
