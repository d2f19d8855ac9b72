"""Editing in context: no weight changes; the facts of a subject are put in front of what is asked of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from easyedit_rls._base.settings import read_settings, setting
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.joints import has_no_spaces
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.data.spans import find_spans, fold, stands_alone
from easyedit_rls.editors.base import Editor, Setup, register_editor

_NAME = "InContext"
_FACTS = "facts"


@dataclass(frozen=True)
class InContextSettings:
    """Of editing in context."""

    template: str = setting(
        "What is put in front of a prompt for each fact; {} is the fact, its prompt with its target.",
        "New fact: {}\n",
        test=lambda value: isinstance(value, str) and value.count("{}") == 1,
        allowed="a text with {} once, where the fact goes",
    )
    n_facts: int = setting("Facts in front of one prompt, at most.", 4, least=1)


@dataclass(frozen=True)
class _Fact:
    question: tuple[str, ...]
    subject: str
    statement: str


@register_editor(_NAME)
class InContext(Editor):
    """Remembers facts as texts. A prompt in which an edited subject stands gets that subject's facts in
    front of it, in the order in which they were edited.

    A later fact replaces an earlier one that answers the same question (`EditRequest.question`). Where more
    than `n_facts` belong to a prompt, those of longer subjects go first, and of equally long ones the newer.

    Args:
        setup: its settings are those of `InContextSettings`.
    """

    takes_chats: ClassVar[bool] = True

    def __init__(self, setup: Setup) -> None:
        self.model = setup.model
        self._settings = _read(setup.settings)
        self._facts: dict[tuple[str, ...], _Fact] = {}  # by question, in the order of edits
        self._folded: dict[str, str] = {}  # subject -> as `fold` has it
        self._n_batches = 0

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that the settings are its own."""
        _read(settings)

    @classmethod
    def begin(cls, setup: Setup) -> "InContext":
        """An editor without facts."""
        return cls(setup)

    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Remember a batch."""
        self._keep([_Fact(one.question, one.subject, _statement(one)) for one in requests])
        self._n_batches += 1

    def in_front(self, prompt: str) -> str:
        """The facts of the subjects in a prompt, each in the template; nothing where there is none."""
        folded = fold(prompt)
        subjects = {
            subject
            for subject, as_folded in self._folded.items()
            if as_folded in folded and _stands_in(prompt, subject)
        }
        found = [(order, fact) for order, fact in enumerate(self._facts.values()) if fact.subject in subjects]
        first = sorted(found, key=lambda one: (-len(one[1].subject), -one[0]))[: self._settings.n_facts]
        before, after = self._settings.template.split("{}")
        return "".join(before + fact.statement + after for _, fact in sorted(first, key=lambda one: one[0]))

    def describe(self) -> dict[str, Any]:
        """All settings."""
        return asdict(self._settings)

    def memory(self) -> dict[str, Tensor]:
        """The facts, as the bytes of a JSON text, (n_bytes,), uint8."""
        kept = {"n_batches": self._n_batches, "facts": [asdict(fact) for fact in self._facts.values()]}
        return {_FACTS: torch.frombuffer(bytearray(json.dumps(kept).encode()), dtype=torch.uint8)}

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Whether the memory is one of its own, after as many batches."""
        if _FACTS not in memory:
            return False
        kept = json.loads(bytes(memory[_FACTS].tolist()))
        if kept["n_batches"] != n_batches:
            return False
        self._n_batches = n_batches
        self._keep([_Fact(**{**fact, "question": tuple(fact["question"])}) for fact in kept["facts"]])
        return True

    def _keep(self, facts: Sequence[_Fact]) -> None:
        for fact in facts:
            self._facts.pop(fact.question, None)  # what is asked again is the newest
            self._facts[fact.question] = fact
        self._folded = {fact.subject: fold(fact.subject) for fact in self._facts.values()}


def _read(settings: Mapping[str, Any]) -> InContextSettings:
    return read_settings(InContextSettings, settings, f"editor {_NAME}")


def _statement(request: EditRequest) -> str:
    """The fact as plain text, also of a chat."""
    return request.prompt + replace(request, chat=None).continuation


def _stands_in(prompt: str, subject: str) -> bool:
    """Whether a subject is in a prompt, as whole words where its script has spaces between words."""
    places = find_spans(prompt, subject)
    return any(stands_alone(prompt, *place) or has_no_spaces(subject) for place in places)
