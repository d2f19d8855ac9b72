"""Other relations of an edited subject: an edit says nothing of them, so the model should go on as it did.

A subject's kind (person, place, organization, work, other) follows from the relation that was edited, and the
kind has questions: prompts with {} for the subject. `relations.json` beside the records' readers holds both,
by Wikidata's numbers of properties. What is compared is the first token behind each question, the most
probable one, with the unedited model's.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.arguments import at_least
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.data.records import EditRecord
from easyedit_rls.data.requests import Probe
from easyedit_rls.data.spans import fold
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.evaluation.scores import predict_rows
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.subject import Row, prompt_rows

_NEUTRAL = "other"  # the kind of a subject whose relation is not known


@dataclass(frozen=True)
class Question:
    """A prompt about any subject of a kind.

    Attributes:
        before, after: what stands around the subject.
        relations: whose edits it asks for: those that say its answer, or all but say it.
    """

    before: str
    after: str
    relations: frozenset[str]

    def about(self, subject: str) -> str:
        """The prompt about a subject."""
        return self.before + subject + self.after


def other_questions(records: Sequence[EditRecord], n: int, seed: int = 0) -> list[list[Probe]]:
    """Questions about each record's subject that no edit of that subject says anything of, as far as the
    records name their relations; where they don't, those that are worded as an edit or its paraphrase are
    left out.

    Args:
        records: all that are edited; of one subject, none is asked for a relation that another one edits.
        n: questions a record; a subject with many edits may have fewer left.
        seed: of the choice, which depends on nothing else but the subject and its relations.

    Returns:
        For each record its questions, in the form of its request.

    Raises:
        HyperParamsError: n is below 0, or more than `most_questions`.
    """
    at_least(n, 0, "n")
    if n > (most := most_questions()):
        raise HyperParamsError(f"n is {n}; allowed: whole numbers from 0 to {most}.")
    kinds, questions = _packaged()
    edited: dict[str, set[str | None]] = defaultdict(set)
    worded: set[str] = set()
    for record in records:
        edited[record.request.subject].add(record.relation)
        worded |= {fold(text).strip() for text in (record.request.prompt, *record.request.paraphrases)}
    chosen = []
    for record in records:
        subject = record.request.subject
        kind = kinds.get(record.relation, _NEUTRAL) if record.relation is not None else _NEUTRAL
        left = [
            question
            for question in questions[kind]
            if not question.relations & edited[subject]
            and fold(question.about(subject)).strip() not in worded
        ]
        picked = Random(f"{seed} {subject}").sample(left, min(n, len(left)))
        chosen.append([record.request.probe(question.about(subject), "") for question in picked])
    return chosen


def most_questions() -> int:
    """How many questions there are for every subject with one edit."""
    kinds, questions = _packaged()
    counts = [len(of_kind) for of_kind in questions.values()]
    for relation, kind in kinds.items():
        counts.append(sum(relation not in question.relations for question in questions[kind]))
    of_neutral = questions[_NEUTRAL]
    for relation in {relation for question in of_neutral for relation in question.relations}:
        counts.append(sum(relation not in question.relations for question in of_neutral))
    return min(counts)


def first_tokens(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    questions: Sequence[Sequence[Probe]],
    *,
    batch_tokens: int = 8192,
    show_progress: bool | None = None,
) -> list[list[int]]:
    """The most probable token behind each question.

    Args:
        model: edited or not.
        tok: its tokenizer.
        questions: for each record its prompts; their answers are not looked at.
        batch_tokens: tokens in one pass, at most.
        show_progress: None shows a bar on a terminal only.

    Returns:
        As many tokens for each record.

    Raises:
        RequestError: a prompt is longer than the model's table of positions; names the record.
        ModelError: a token is none of the model's.
    """
    numbered = [(number, probe) for number, probes in enumerate(questions) for probe in probes]
    prompts = prompt_rows(tok, [probe for _, probe in numbered])
    refuse_unfit(model, tok, prompts, [number for number, _ in numbered])
    rows = [Row((*ids, 0), len(ids) - 1, len(ids)) for ids in prompts]  # the last token is never run
    found = predict_rows(
        model, rows, batch_tokens=batch_tokens, desc="other relations", show_progress=show_progress
    )
    tokens: list[list[int]] = [[] for _ in questions]
    for (number, _), (token,) in zip(numbered, found):
        tokens[number].append(token)
    return tokens


def unchanged(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> list[float | None]:
    """The share of each record's first tokens that are as before; None where it has none.

    Args:
        before: `first_tokens` of the unedited model.
        after: of the edited one, to the same questions.
    """
    return [
        fmean(float(a == b) for a, b in zip(old, new, strict=True)) if old else None
        for old, new in zip(before, after, strict=True)
    ]


def _packaged() -> tuple[dict[str, str], dict[str, list[Question]]]:
    """Relation -> kind of its subjects; kind -> its questions."""
    raw = json.loads(packaged_text("relations.json"))
    kinds = {relation: kind for kind, relations in raw["kinds"].items() for relation in relations}
    questions = {
        kind: [_question(item["text"], item["relations"]) for item in items]
        for kind, items in raw["questions"].items()
    }
    return kinds, questions


def _question(text: str, relations: Sequence[str]) -> Question:
    before, after = text.split("{}")
    return Question(before, after, frozenset(relations))
