"""Edit requests and evaluation records: parse, validate, name the fault.

These formats are understood everywhere:

* EasyEdit's dict: ``prompt`` (with the subject in it, or with ``{}`` in its place), ``subject``,
  ``target_new``, and for evaluation ``ground_truth``, ``rephrase_prompt``, ``locality`` (or
  ``locality_prompt`` and ``locality_ground_truth``);
* items of EasyEdit's data sets as they come. Its ``ZsreDataset`` drops the subject, which is then found as
  the one name that prompt and rewording share (`subjects.find_subject`), or else the request is refused;
* a CounterFact record: ``requested_rewrite`` with ``prompt``, ``subject``, ``target_new.str``,
  ``target_true.str``, and for evaluation ``paraphrase_prompts``, ``neighborhood_prompts``;
* a chat: any of these with ``messages`` instead of ``prompt``, a list of ``{"role", "content"}`` whose last
  one is the user's. Paraphrases and neighbors are user's turns behind the same earlier ones then.

Texts are taken as they are given, white space at their ends included. What stands between a prompt and its
target follows from the text (`joints.joint`), or is the request's ``joint``.

Nothing is mutated, and text is never passed through ``str.format``: braces in it are just characters.
"""

import logging
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from easyedit_rls._base.arguments import listed
from easyedit_rls.data.checks import (
    Chat,
    case_id,
    importance,
    is_nan,
    mapping,
    parse_joint,
    parse_messages,
    text,
    texts,
    told_of,
)
from easyedit_rls.data.joints import joint as joint_of
from easyedit_rls.data.spans import find_spans, stands_alone
from easyedit_rls.data.subjects import find_subject
from easyedit_rls.errors import RequestError

logger = logging.getLogger(__name__)

_REWORDED = ("paraphrase_prompts", "rephrase_prompt", "rephrase")  # CounterFact's name, and EasyEdit's two


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer it should (or should still) get.

    Attributes:
        prompt: a text, or the user's turn of a chat.
        answer: what should follow.
        joint: what stands between the two; None: as the text tells.
        chat: None for plain text; for a chat the turns (role, content) before the user's, () if there are
            none.
    """

    prompt: str
    answer: str
    joint: str | None = None
    chat: Chat | None = None


@dataclass(frozen=True)
class EditRequest:
    """One fact to be edited in.

    Attributes:
        before: the prompt up to the subject.
        subject: the subject's text.
        after: the prompt behind the subject.
        target: what the model shall say next.
        target_true: what it should have said before the edit, if known.
        importance: d_i in the objective, from 1e-6 to 1e6.
        paraphrases: other prompts for the same fact.
        neighbors: prompts about other subjects, with the answers they should keep (EasyEdit's ``locality``
            too).
        case_id: the caller's own number or name of the request, if any.
        joint: what stands between prompt and target; None: as the text tells (`joints.joint`), or the chat
            template.
        chat: None for a plain prompt; for a chat the turns (role, content) before the user's, which before,
            subject and after make up.
    """

    before: str
    subject: str
    after: str
    target: str
    target_true: str | None = None
    importance: float = 1.0
    paraphrases: tuple[str, ...] = ()
    neighbors: tuple[Probe, ...] = ()
    case_id: int | str | None = None
    joint: str | None = None
    chat: Chat | None = None

    @property
    def prompt(self) -> str:
        """The whole prompt; of a chat, the user's turn."""
        return self.before + self.subject + self.after

    @property
    def continuation(self) -> str:
        """The target with what joins it to the prompt; of a chat without a joint of its own, the target
        alone.
        """
        if self.joint is None and self.chat is None:
            return joint_of(self.prompt, self.target) + self.target
        return (self.joint or "") + self.target

    @property
    def question(self) -> tuple[str, ...]:
        """What is asked: the prompt, and of a chat its turns, whatever the spacing, the way Unicode is
        written, or the subject in it.

        Two requests with the same question contradict each other or agree.
        """
        turns = (
            () if self.chat is None else tuple(text for turn in (*self.chat, ("user", "")) for text in turn)
        )
        return tuple(" ".join(unicodedata.normalize("NFC", text).split()) for text in (self.prompt, *turns))

    def probe(self, prompt: str, answer: str) -> Probe:
        """A prompt of this request's form, with an answer."""
        return Probe(prompt, answer, self.joint, self.chat)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, defaults left out; `from_dict` makes the request again."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.neighbors:
            values["neighbors"] = [self._plain(probe) for probe in self.neighbors]
        if self.chat is not None:
            values["chat"] = [list(turn) for turn in self.chat]
        return values | ({"paraphrases": list(self.paraphrases)} if self.paraphrases else {})

    def _plain(self, probe: Probe) -> list[Any]:
        """A probe for JSON; joint and chat are left out where they are the request's."""
        is_alike = probe == self.probe(probe.prompt, probe.answer)
        chat = None if probe.chat is None else [list(turn) for turn in probe.chat]
        return [probe.prompt, probe.answer] if is_alike else [probe.prompt, probe.answer, probe.joint, chat]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EditRequest":
        """The request that `to_dict` was called on."""
        joint, chat = values.get("joint"), _turns(values.get("chat"))
        neighbors = tuple(
            Probe(prompt, answer, own[0], _turns(own[1])) if own else Probe(prompt, answer, joint, chat)
            for prompt, answer, *own in values.get("neighbors", ())
        )
        paraphrases = tuple(values.get("paraphrases", ()))
        return cls(**{**values, "neighbors": neighbors, "paraphrases": paraphrases, "chat": chat})


def _turns(chat: Sequence[Sequence[str]] | None) -> Chat | None:
    return None if chat is None else tuple((role, content) for role, content in chat)


def as_chat(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The same requests with every prompt, paraphrase and neighbor as a user's turn; what is a chat already
    stays as it is.
    """

    def wrapped(request: EditRequest) -> EditRequest:
        neighbors = tuple(
            replace(probe, chat=()) if probe.chat is None else probe for probe in request.neighbors
        )
        return replace(request, neighbors=neighbors, chat=() if request.chat is None else request.chat)

    return [wrapped(request) for request in requests]


def parse_requests(
    requests: Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest,
    *,
    chat_template: bool = False,
) -> list[EditRequest]:
    """Turn what users hand over into checked requests.

    Args:
        requests: one request or a list of them, each EasyEdit's dict, a CounterFact record, or an
            `EditRequest`.
        chat_template: make every prompt a user's turn, see `as_chat`.

    Raises:
        ArgumentError: it is no list.
        RequestError: names the request by its position, the field, and the cure.
    """
    if isinstance(requests, (Mapping, EditRequest)):
        requests = [requests]
    requests = listed(requests, "requests", "EasyEdit's dicts or CounterFact records")
    if not requests:
        raise RequestError("the list is empty. Give at least one request.")
    parsed = []
    for index, request in enumerate(requests):
        with told_of(index):
            parsed.append(_checked(request) if isinstance(request, EditRequest) else _parse(request))
    return as_chat(parsed) if chat_template else parsed


def _checked(request: EditRequest) -> EditRequest:
    """A request that was made by hand, with its numbers as plain ones."""
    return replace(request, importance=importance(request.importance), case_id=case_id(request.case_id))


def _parse(raw: Mapping[str, Any]) -> EditRequest:
    if not isinstance(raw, Mapping):
        raise RequestError(
            f"is a {type(raw).__name__}, not a mapping. Give EasyEdit's dict or a CounterFact record."
        )
    fact = {**raw, **mapping(raw, "requested_rewrite")}
    chat, field = None, "prompt"
    if fact.get("messages") is not None:
        chat, fact["prompt"] = parse_messages(fact)
        field = "messages"
    has_none = "cond" in fact and "subject" not in fact
    subject = _zsre_subject(fact) if has_none else text(fact, "subject")
    before, subject, after = _split_prompt(text(fact, "prompt"), subject, field)
    joint = parse_joint(fact)
    target = text(fact, "target_new")
    target_true = _true_answer(fact)
    paraphrases = [prompt for name in _REWORDED for prompt in texts(fact, name)]
    neighbors = [(prompt, str(target_true)) for prompt in texts(fact, "neighborhood_prompts")]
    if neighbors and target_true is None:
        raise RequestError(
            "is missing, but neighborhood_prompts need it as their answer. Add it.", field="target_true"
        )
    if fact.get("locality_prompt") is not None:
        neighbors.append((text(fact, "locality_prompt"), text(fact, "locality_ground_truth")))
    for kind, pair in mapping(fact, "locality").items():
        if not isinstance(pair, Mapping):
            raise RequestError(f"'{kind}' is no mapping. Give prompt and ground_truth.", field="locality")
        prompts, answers = texts(pair, "prompt"), texts(pair, "ground_truth")
        if len(prompts) != len(answers):
            raise RequestError(
                f"'{kind}' has {len(prompts)} prompts and {len(answers)} answers. Give one each.",
                field="locality",
            )
        neighbors += zip(prompts, answers)

    return EditRequest(
        before=before,
        subject=subject,
        after=after,
        target=target,
        target_true=target_true,
        importance=importance(fact.get("importance", 1.0)),
        paraphrases=tuple(dict.fromkeys(paraphrases)),
        neighbors=tuple(Probe(prompt, answer, joint, chat) for prompt, answer in neighbors),
        case_id=case_id(raw.get("case_id")),
        joint=joint,
        chat=chat,
    )


def _true_answer(fact: Mapping[str, Any]) -> str | None:
    """What the model should have said before, the first of lists of right answers; None where there is
    nothing.
    """
    name = "target_true" if fact.get("target_true") is not None else "ground_truth"
    answer = fact.get(name)
    if isinstance(answer, Mapping):
        answer = answer.get("str")
    while isinstance(answer, (list, tuple)):  # KnowEdit has every right answer, in lists of lists
        answer = answer[0] if answer else None
    if answer is None or is_nan(answer) or (isinstance(answer, str) and not answer.strip()):
        return None
    return text({name: answer}, name)


def _zsre_subject(fact: Mapping[str, Any]) -> str:
    subject = find_subject(text(fact, "prompt"), text(fact, "rephrase_prompt"))
    logger.info("A request comes without a subject; taken from its rewording: %r", subject)
    return subject


def _split_prompt(prompt: str, subject: str, field: str) -> tuple[str, str, str]:
    """Text before the subject, the subject as the prompt writes it, and text behind it.

    ``{}`` marks the place if it is there; otherwise the last occurrence that stands as a word of its own
    counts, and failing that the last one at all (languages without spaces). White space around a subject is
    none of it.
    """
    slots = prompt.count("{}")
    if slots > 1:
        raise RequestError(
            f"has {slots} places marked {{}}: {prompt!r}. Mark the subject's place once.", field=field
        )
    if slots == 1:
        before, after = prompt.split("{}")
        start = len(before) + len(subject) - len(subject.lstrip())
        prompt, places = before + subject + after, [(start, start + len(subject.strip()))]
    else:
        places = find_spans(prompt, subject.strip())
    if not places:
        raise RequestError(
            f"does not contain the subject {subject!r}: {prompt!r}. "
            "Write the subject into the prompt, or {} where it goes.",
            field=field,
        )
    words = [place for place in places if stands_alone(prompt, *place)]
    start, end = (words or places)[-1]
    return prompt[:start], prompt[start:end], prompt[end:]
