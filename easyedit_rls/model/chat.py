"""Prompts as the model sees them: plain text, or a chat as the tokenizer's template writes it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from easyedit_rls.data.checks import Chat
from easyedit_rls.data.joints import joint as joint_of
from easyedit_rls.errors import LayoutError, RequestError

_MARK = "⟦⟧7130⟦⟧"  # stands for a turn's text while the template's own parts are looked for


@dataclass(frozen=True)
class Prompt:
    """A prompt ready to be encoded.

    Attributes:
        head: what the template puts before the user's text; nothing before plain text.
        user: the user's text as the template writes it (some take white space off its ends), or the plain
            text.
        tail: what the template puts behind it, up to where the answer begins.
        is_chat: whether a template wrote it; then it has its start token already, or none.
        joint: what stands before the answer, given by the request; None: what the template puts there, or as
            the text tells.
        gap: what the template puts between all this and an answer, white space or nothing.
    """

    head: str
    user: str
    tail: str
    is_chat: bool = False
    joint: str | None = None
    gap: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return self.head + self.user + self.tail

    def joined(self, answer: str) -> str:
        """An answer with what joins it to the prompt."""
        if self.joint is not None:
            return self.joint + answer
        if self.is_chat:
            return answer if answer[:1].isspace() else self.gap + answer
        return joint_of(self.text, answer) + answer


def prepare(
    tok: PreTrainedTokenizerBase, texts: Iterable[tuple[str, str | None, Chat | None]]
) -> list[Prompt]:
    """Prompts of (text, joint, chat), each as `EditRequest` and `Probe` have them.

    Raises:
        LayoutError: the tokenizer has no chat template.
        RequestError: the template refuses the turns, or changes the user's text.
    """
    frames: dict[Chat, tuple[str, str, str]] = {}
    prompts = []
    for text, joint, chat in texts:
        if chat is None:
            prompts.append(Prompt("", text, "", joint=joint))
            continue
        if chat not in frames:
            frames[chat] = _frame(tok, chat)
        head, tail, gap = frames[chat]
        prompts.append(Prompt(*_place(tok, chat, text, head, tail), is_chat=True, joint=joint, gap=gap))
    return prompts


def _place(tok: PreTrainedTokenizerBase, chat: Chat, text: str, head: str, tail: str) -> tuple[str, str, str]:
    """What the template makes of a chat, cut before and behind the user's text."""
    whole = _render(tok, [*chat, ("user", text)])
    for user in (text, text.strip()):
        if whole == head + user + tail:
            return head, user, tail
    start = whole.rfind(text.strip())
    if start < 0:
        raise RequestError(
            f"The chat template changes the user's turn {text!r}. "
            "Give the prompt as plain text, or another wording."
        )
    end = start + len(text.strip())
    return whole[:start], whole[start:end], whole[end:]


def _frame(tok: PreTrainedTokenizerBase, chat: Chat) -> tuple[str, str, str]:
    """What the template puts before and behind the user's text, and between the latter and an answer."""
    whole = _render(tok, [*chat, ("user", _MARK)])
    head, mark, tail = whole.rpartition(_MARK)
    if not mark:
        raise RequestError(
            "The chat template leaves the user's turn out. Change messages, or the tokenizer's chat_template."
        )
    try:
        answered = _render(tok, [*chat, ("user", _MARK), ("assistant", _MARK)], is_open=False)
    except RequestError:  # a template that only takes what is to be answered says nothing of answers
        return head, tail, ""
    between, mark, _ = answered.removeprefix(whole).partition(_MARK)
    return head, tail, between if mark and answered.startswith(whole) and between.isspace() else ""


def _render(tok: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], is_open: bool = True) -> str:
    """A chat as text, up to where the answer begins if it is open."""
    if not tok.chat_template:
        raise LayoutError(
            f"{type(tok).__name__} has no chat template. "
            "Load the tokenizer of a chat model, set tok.chat_template, or use plain prompts."
        )
    messages = [{"role": role, "content": content} for role, content in turns]
    try:
        rendered: str = tok.apply_chat_template(messages, add_generation_prompt=is_open, tokenize=False)
    except TemplateError as exc:
        roles = ", ".join(role for role, _ in turns)
        raise RequestError(
            f"The chat template refuses turns of {roles}: {exc}. Change messages.", field="messages"
        ) from exc
    return rendered
