"""Token positions: where the subject ends and where the target begins, from the tokenizer's character offsets."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from easyedit_rls.errors import LayoutError, RequestError


@dataclass(frozen=True)
class Row:
    """One tokenised text.

    Attributes:
        ids: its tokens, special ones in front included.
        subject_last: position of the subject's last token.
        target_start: position of the target's first token; ``len(ids)`` without a target.
    """

    ids: tuple[int, ...]
    subject_last: int
    target_start: int

    @property
    def target(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.ids[self.target_start :]


def tokenize_fact(tok: PreTrainedTokenizerBase, before: str, subject: str, after: str, target: str | None = None) -> Row:
    """Tokenise ``before + subject + after [+ " " + target]`` as one text and find the positions in it.

    The subject's last token is the last one that shares a character with the subject, so a token that joins its last
    letters with what follows counts. Target tokens are those that reach behind the prompt.

    Raises:
        RequestError: the subject or the target has no token of its own, or the target holds the unknown token.
        LayoutError: the tokenizer gives no character offsets.
    """
    prompt = before + subject + after
    ids, offsets = _encode(tok, prompt if target is None else f"{prompt} {target}")
    inside = _inside(offsets, before, subject, after)
    target_start = next((i for i, (_, b) in enumerate(offsets) if b > len(prompt)), len(ids))
    if target is not None:
        if target_start == len(ids) or target_start <= inside[-1]:
            raise RequestError(f"{target!r} has no token of its own behind {prompt!r}. Choose another wording.", field="target_new")
        if tok.unk_token_id is not None and tok.unk_token_id in ids[target_start:]:
            raise RequestError(
                f"{target!r} holds the tokenizer's unknown token {tok.unk_token!r}. Write it with characters the model knows.",
                field="target_new",
            )
    return Row(ids=tuple(ids), subject_last=inside[-1], target_start=target_start)


def subject_tokens(tok: PreTrainedTokenizerBase, before: str, subject: str, after: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of ``before + subject + after``, and the positions of those that share a character with the subject.

    Raises:
        RequestError: the subject has no token.
        LayoutError: the tokenizer gives no character offsets.
    """
    ids, offsets = _encode(tok, before + subject + after)
    return tuple(ids), _inside(offsets, before, subject, after)


def tokenize_answer(tok: PreTrainedTokenizerBase, prompt: str, answer: str) -> Row:
    """Tokenise ``prompt + " " + answer``; the answer's tokens are the row's target, the prompt's last token its subject."""
    ids, offsets = _encode(tok, f"{prompt} {answer}")
    start = next((i for i, (_, b) in enumerate(offsets) if b > len(prompt)), len(ids))
    if start == len(ids):
        raise RequestError(f"{answer!r} has no token of its own behind {prompt!r}.", field="answer")
    return Row(ids=tuple(ids), subject_last=start - 1, target_start=start)


def _inside(offsets: list[tuple[int, int]], before: str, subject: str, after: str) -> tuple[int, ...]:
    start, end = len(before), len(before) + len(subject)
    inside = tuple(i for i, (a, b) in enumerate(offsets) if a < end and b > start)
    if not inside:
        raise RequestError(f"{subject!r} has no token in {before + subject + after!r}. Choose another wording.", field="subject")
    return inside


def _encode(tok: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tok.is_fast:
        raise LayoutError(f"{type(tok).__name__} gives no character offsets. Load the fast tokenizer (use_fast=True).")
    encoded = tok(text, return_offsets_mapping=True, truncation=False)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while offsets and offsets[-1] == (0, 0):  # an end-of-text token that the tokenizer appends
        ids.pop(), offsets.pop()
    return ids, offsets
