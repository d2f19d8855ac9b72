"""Edit requests and evaluation records: parse, validate, name the fault.

These formats are understood everywhere:

* EasyEdit's dict: ``prompt`` (with the subject in it, or with ``{}`` in its place), ``subject``, ``target_new``, and for evaluation
  ``ground_truth``, ``rephrase_prompt``, ``locality`` (or ``locality_prompt`` and ``locality_ground_truth``);
* items of EasyEdit's data sets as they come. Its ``ZsreDataset`` drops the subject, which is then found as the one name that prompt and
  rewording share (`subjects.find_subject`), or else the request is refused;
* a CounterFact record: ``requested_rewrite`` with ``prompt``, ``subject``, ``target_new.str``, ``target_true.str``, and for
  evaluation ``paraphrase_prompts``, ``neighborhood_prompts``.

Nothing is mutated, and text is never passed through ``str.format``: braces in it are just characters.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from easyedit_rls.errors import RequestError
from easyedit_rls.subjects import find_subject

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """A prompt and the answer it should (or should still) get. Neither ends or begins with a space."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class EditRequest:
    """One fact to be edited in.

    Attributes:
        before: the prompt up to the subject.
        subject: the subject's text.
        after: the prompt behind the subject, without trailing spaces.
        target: what the model shall say next, without surrounding spaces.
        target_true: what it should have said before the edit, if known.
        importance: d_i in the objective, positive.
        paraphrases: other prompts for the same fact.
        neighbors: prompts about other subjects, with the answers they should keep (EasyEdit's ``locality`` too).
        case_id: the caller's own number or name of the request, if any.
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

    @property
    def prompt(self) -> str:
        """The whole prompt."""
        return self.before + self.subject + self.after

    @property
    def question(self) -> tuple[str, str, str]:
        """What is asked of which subject, whatever the spacing: two requests with the same question contradict each other or agree."""
        before, subject, after = (" ".join(text.split()) for text in (self.before, self.subject, self.after))
        return before, subject, after

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, defaults left out; `from_dict` makes the request again."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        if self.neighbors:
            values["neighbors"] = [[probe.prompt, probe.answer] for probe in self.neighbors]
        return values | ({"paraphrases": list(self.paraphrases)} if self.paraphrases else {})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "EditRequest":
        """The request that `to_dict` was called on."""
        neighbors = tuple(Probe(prompt, answer) for prompt, answer in values.get("neighbors", ()))
        return cls(**{**values, "neighbors": neighbors, "paraphrases": tuple(values.get("paraphrases", ()))})


def parse_requests(requests: Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest) -> list[EditRequest]:
    """Turn what users hand over into checked requests.

    Args:
        requests: one request or a list of them, each EasyEdit's dict, a CounterFact record, or an `EditRequest`.

    Raises:
        RequestError: names the request by its position, the field, and the cure.
    """
    if isinstance(requests, (Mapping, EditRequest)):
        requests = [requests]
    if not requests:
        raise RequestError("the list is empty. Give at least one request.")
    return [request if isinstance(request, EditRequest) else _parse(request, i) for i, request in enumerate(requests)]


def _parse(raw: Mapping[str, Any], index: int) -> EditRequest:
    if not isinstance(raw, Mapping):
        raise RequestError(f"is a {type(raw).__name__}, not a mapping. Give EasyEdit's dict or a CounterFact record.", index=index)
    fact = {**raw, **_mapping(raw, "requested_rewrite", index)}
    subject = _zsre_subject(fact, index) if "cond" in fact and "subject" not in fact else _text(fact, "subject", index)
    before, after = _split_prompt(_text(fact, "prompt", index), subject, index)
    target = _text(fact, "target_new", index)
    true_key = "target_true" if fact.get("target_true") is not None else "ground_truth"
    answers = fact.get(true_key)
    if isinstance(answers, (list, tuple)) and len(answers) > 1:  # KnowEdit lists every right answer
        fact[true_key] = answers[0]
    target_true = _text(fact, true_key, index) if answers is not None else None

    importance = fact.get("importance", 1.0)
    if isinstance(importance, bool) or not isinstance(importance, (int, float)) or not 0 < importance < float("inf"):
        raise RequestError(f"is {importance!r}. Give a positive number; 1 is the usual weight.", index=index, field="importance")

    paraphrases = _texts(fact, "paraphrase_prompts", index) + _texts(fact, "rephrase_prompt", index)
    neighbors = [Probe(prompt.rstrip(), str(target_true)) for prompt in _texts(fact, "neighborhood_prompts", index)]
    if neighbors and target_true is None:
        raise RequestError("is missing, but neighborhood_prompts need it as their answer. Add it.", index=index, field="target_true")
    if fact.get("locality_prompt") is not None:
        neighbors.append(Probe(_text(fact, "locality_prompt", index).rstrip(), _text(fact, "locality_ground_truth", index)))
    for kind, pair in _mapping(fact, "locality", index).items():
        if not isinstance(pair, Mapping):
            raise RequestError(f"'{kind}' is no mapping. Give prompt and ground_truth.", index=index, field="locality")
        prompts, answers = _texts(pair, "prompt", index), _texts(pair, "ground_truth", index)
        if len(prompts) != len(answers):
            raise RequestError(
                f"'{kind}' has {len(prompts)} prompts and {len(answers)} answers. Give one each.", index=index, field="locality"
            )
        neighbors += [Probe(p.rstrip(), a.strip()) for p, a in zip(prompts, answers)]

    return EditRequest(
        before=before,
        subject=subject,
        after=after,
        target=target,
        target_true=target_true,
        importance=float(importance),
        paraphrases=tuple(p.rstrip() for p in paraphrases),
        neighbors=tuple(neighbors),
        case_id=raw.get("case_id"),
    )


def _zsre_subject(fact: Mapping[str, Any], index: int) -> str:
    try:
        subject = find_subject(_text(fact, "prompt", index), _text(fact, "rephrase_prompt", index))
    except RequestError as exc:
        raise exc.at(index) from None
    logger.info("Request %d comes without a subject; taken from its rewording: %r", index, subject)
    return subject


def _split_prompt(prompt: str, subject: str, index: int) -> tuple[str, str]:
    """Text before and behind the subject.

    ``{}`` marks the place if it is there; otherwise the last occurrence that stands as a word of its own counts, and
    failing that the last one at all (languages without spaces).
    """
    slots = prompt.count("{}")
    if slots > 1:
        raise RequestError(f"has {slots} places marked {{}}: {prompt!r}. Mark the subject's place once.", index=index, field="prompt")
    if slots == 1:
        before, after = prompt.split("{}")
        return before, after.rstrip()
    places = [match.start() for match in re.finditer(f"(?={re.escape(subject)})", prompt)]
    if not places:
        raise RequestError(
            f"does not contain the subject {subject!r}: {prompt!r}. Write the subject into the prompt, or {{}} where it goes.",
            index=index,
            field="prompt",
        )
    words = [at for at in places if _stands_alone(prompt, at, at + len(subject))]
    start = (words or places)[-1]
    return prompt[:start], prompt[start + len(subject) :].rstrip()


def _stands_alone(text: str, start: int, end: int) -> bool:
    return not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum())


def _text(fact: Mapping[str, Any], key: str, index: int) -> str:
    value = fact.get(key)
    if isinstance(value, Mapping):  # CounterFact: {"str": ..., "id": ...}
        value = value.get("str")
    if isinstance(value, (list, tuple)) and len(value) == 1:  # some EasyEdit data sets
        value = value[0]
    if value is None:
        raise RequestError("is missing. Add it.", index=index, field=key)
    if not isinstance(value, str):
        raise RequestError(f"is a {type(value).__name__}, not text.", index=index, field=key)
    if not value.strip():
        raise RequestError("is empty. Give its text.", index=index, field=key)
    return value.strip() if key != "prompt" else value


def _texts(fact: Mapping[str, Any], key: str, index: int) -> list[str]:
    value = fact.get(key)
    if value is None or value == "":
        return []
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(v, str) and v.strip() for v in values):
        raise RequestError("is neither a text nor a list of texts.", index=index, field=key)
    return list(values)


def _mapping(fact: Mapping[str, Any], key: str, index: int) -> Mapping[str, Any]:
    value = fact.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"is a {type(value).__name__}, not a mapping.", index=index, field=key)
    return value
