"""Token positions: where the subject ends and where the target begins, from the tokenizer's character
offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from easyedit_rls.data.checks import Chat
from easyedit_rls.data.requests import Probe
from easyedit_rls.errors import RequestError
from easyedit_rls.model.chat import Prompt, prepare
from easyedit_rls.model.tokens import Encoded, continue_all, continue_with, encode, encode_all


@dataclass(frozen=True)
class Row:
    """One tokenized text.

    Attributes:
        ids: its tokens, special ones in front included.
        place: position where a value is put: that of the subject's last token, or of the one behind it (see
            `tokenize_fact`).
        target_start: position of the target's first token; ``len(ids)`` without a target.
    """

    ids: tuple[int, ...]
    place: int
    target_start: int

    @property
    def target(self) -> tuple[int, ...]:
        """The target's tokens."""
        return self.ids[self.target_start :]


def tokenize_fact(
    tok: PreTrainedTokenizerBase,
    before: str,
    subject: str,
    after: str,
    target: str | None = None,
    *,
    joint: str | None = None,
    chat: Chat | None = None,
) -> Row:
    """Tokenize ``before + subject + after`` and the target behind it, and find the positions.

    The subject's last token is the last one that shares a character with the subject, so a token that joins
    its last letters with what follows in the prompt counts. The prompt's tokens are those it has without a
    target.

    That token is the place of a value, unless it is the text's very first: later tokens hardly read what is
    written there (the attention sink; Xiao et al. 2024, arXiv 2309.17453). Then the prompt's second token is
    the place, if it has one.

    Args:
        tok: a fast tokenizer.
        before, subject, after: the prompt; of a chat, the user's turn.
        target: what follows, if anything.
        joint, chat: see `EditRequest`.

    Raises:
        RequestError: the subject or the target has no token of its own, or the target holds the unknown
            token.
        LayoutError: the tokenizer gives no character offsets, or has no chat template.
    """
    prompt, encoded, inside = _located(tok, before, subject, after, joint, chat)
    place = max(inside[-1], min(1, len(encoded.ids) - 1))
    if target is None:
        return Row(encoded.ids, place, len(encoded.ids))
    try:
        own = continue_with(tok, encoded, prompt.text, prompt.joined(target))
    except RequestError as exc:
        raise RequestError(exc.problem, field="target_new") from exc
    if not own:
        raise RequestError(
            f"{target!r} has no token of its own behind {prompt.user!r}. Choose another wording.",
            field="target_new",
        )
    if tok.unk_token_id is not None and tok.unk_token_id in own:
        raise RequestError(
            f"{target!r} holds the tokenizer's unknown token {tok.unk_token!r}. "
            "Write it with characters the model knows.",
            field="target_new",
        )
    return Row(encoded.ids + own, place, len(encoded.ids))


def subject_tokens(
    tok: PreTrainedTokenizerBase, before: str, subject: str, after: str, chat: Chat | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of ``before + subject + after``, and the positions of those that share a character with the
    subject.

    Raises:
        RequestError: the subject has no token.
        LayoutError: the tokenizer gives no character offsets, or has no chat template.
    """
    _, encoded, inside = _located(tok, before, subject, after, None, chat)
    return encoded.ids, inside


def prompt_rows(tok: PreTrainedTokenizerBase, prompts: Sequence[str | Probe]) -> list[tuple[int, ...]]:
    """The tokens of prompts alone, which the model goes on behind; a text is a plain prompt."""
    probes = [Probe(prompt, "") if isinstance(prompt, str) else prompt for prompt in prompts]
    return [encoded.ids for encoded in _encoded(tok, _prepared(tok, probes))]


def answer_rows(
    tok: PreTrainedTokenizerBase, probes: Sequence[Probe], numbers: Sequence[int] | None = None
) -> list[Row]:
    """Tokenize prompts and answers; an answer's tokens are its row's target, the prompt's last token its
    place.

    Args:
        tok: a fast tokenizer.
        probes: prompts with answers.
        numbers: for errors, the number of the record that each belongs to.

    Raises:
        RequestError: an answer has no token of its own.
        LayoutError: the tokenizer gives no character offsets, or has no chat template.
    """
    prompts = _prepared(tok, probes)
    encoded = _encoded(tok, prompts)
    parts = [
        (ids, prompt.text, prompt.joined(probe.answer))
        for ids, prompt, probe in zip(encoded, prompts, probes)
    ]
    try:
        answers = continue_all(tok, parts)
        for number, (probe, answer, ids) in enumerate(zip(probes, answers, encoded)):
            if not answer or not ids.ids:
                what, field = (
                    (f"{probe.answer!r} has no token of its own behind", "answer")
                    if ids.ids
                    else ("no token in", "prompt")
                )
                raise RequestError(f"{what} {probe.prompt!r}. Give a text.", index=number, field=field)
    except RequestError as exc:
        index = None if numbers is None or exc.index is None else numbers[exc.index]
        raise RequestError(exc.problem, index=index, field=exc.field) from None
    return [Row(ids.ids + answer, len(ids.ids) - 1, len(ids.ids)) for ids, answer in zip(encoded, answers)]


def _prepared(tok: PreTrainedTokenizerBase, probes: Sequence[Probe]) -> list[Prompt]:
    return prepare(tok, [(probe.prompt, probe.joint, probe.chat) for probe in probes])


def _encoded(tok: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[Encoded]:
    return encode_all(
        tok, [prompt.text for prompt in prompts], with_start=[not prompt.is_chat for prompt in prompts]
    )


def _located(
    tok: PreTrainedTokenizerBase, before: str, subject: str, after: str, joint: str | None, chat: Chat | None
) -> tuple[Prompt, Encoded, tuple[int, ...]]:
    """The prompt, its tokens, and the positions of the subject's."""
    whole = before + subject + after
    (prompt,) = prepare(tok, [(whole, joint, chat)])
    encoded = encode(tok, prompt.text, with_start=not prompt.is_chat)
    cut = (
        0 if prompt.user == whole else len(whole) - len(whole.lstrip())
    )  # white space that a template took off
    start = len(prompt.head) + len(before) - cut
    inside = tuple(i for i, (a, b) in enumerate(encoded.offsets) if a < start + len(subject) and b > start)
    if not inside:
        raise RequestError(f"{subject!r} has no token in {whole!r}. Choose another wording.", field="subject")
    return prompt, encoded, inside
