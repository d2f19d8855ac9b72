"""CounterFact's metrics (Meng et al. 2022, section 3.4), and their argmax counterparts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.requests import EditRequest, Probe, parse_requests
from easyedit_rls.scoring import Score, score


@dataclass(frozen=True)
class RecordScores:
    """Figures of one record, each in [0, 1]; None where the record has nothing to measure it on."""

    case_id: int | str | None
    efficacy: float | None
    rewrite_accuracy: float
    generalization: float | None
    paraphrase_accuracy: float | None
    specificity: float | None
    neighborhood_accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """Means over records, each in [0, 1]; None where no record has what it takes.

    P is the likelihood of an answer, the geometric mean over its tokens, under teacher forcing; "argmax" means that every
    token of the answer is the most probable one.

    Attributes:
        efficacy: how often P(new) > P(true) on the edited prompt (ES).
        rewrite_accuracy: how often the new answer is the argmax on the edited prompt.
        generalization: how often P(new) > P(true) on paraphrases, averaged within a record first (PS).
        paraphrase_accuracy: how often the new answer is the argmax on paraphrases.
        specificity: how often P(true) > P(new) on neighbourhood prompts (NS).
        neighborhood_accuracy: how often the true answer is the argmax on neighbourhood prompts.
        records: the same, a record each.
    """

    efficacy: float | None
    rewrite_accuracy: float | None
    generalization: float | None
    paraphrase_accuracy: float | None
    specificity: float | None
    neighborhood_accuracy: float | None
    records: tuple[RecordScores, ...]

    def means(self) -> dict[str, float | None]:
        """The six means, by name."""
        return {name: getattr(self, name) for name in METRICS}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


METRICS = ("efficacy", "rewrite_accuracy", "generalization", "paraphrase_accuracy", "specificity", "neighborhood_accuracy")


def evaluate(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest,
    *,
    batch_tokens: int = 8192,
    show_progress: bool | None = None,
) -> Evaluation:
    """Measure how a model answers the records' prompts, their paraphrases and their neighbours.

    Args:
        model: edited or not.
        tok: its tokenizer.
        records: one or a list: EasyEdit's dicts or CounterFact records.
        batch_tokens: tokens in one pass, at most.
        show_progress: None shows a bar on a terminal only.
    """
    requests = parse_requests(records)
    probes = list(dict.fromkeys(probe for request in requests for probe in _probes(request)))
    scores = dict(zip(probes, score(model, tok, probes, batch_tokens=batch_tokens, desc="evaluating", show_progress=show_progress)))
    return summarise([_record_scores(request, scores) for request in requests])


def summarise(records: Sequence[RecordScores]) -> Evaluation:
    """Means over records; those that lack a figure don't count for it."""
    means = {name: _mean([getattr(record, name) for record in records]) for name in METRICS}
    return Evaluation(**means, records=tuple(records))


def _probes(request: EditRequest) -> list[Probe]:
    """Everything the record's figures need scored."""
    prompts = [request.prompt, *request.paraphrases]
    wanted = [Probe(prompt, request.target) for prompt in prompts]
    if request.target_true is not None:
        wanted += [Probe(prompt, request.target_true) for prompt in prompts]
    return wanted + list(request.neighbors) + [Probe(neighbor.prompt, request.target) for neighbor in request.neighbors]


def _record_scores(request: EditRequest, scores: Mapping[Probe, Score]) -> RecordScores:
    def prefers(prompt: str, answer: str, other: str | None) -> float | None:
        if other is None:
            return None
        return float(scores[Probe(prompt, answer)].nll < scores[Probe(prompt, other)].nll)

    new, true = request.target, request.target_true
    return RecordScores(
        case_id=request.case_id,
        efficacy=prefers(request.prompt, new, true),
        rewrite_accuracy=float(scores[Probe(request.prompt, new)].is_argmax),
        generalization=_mean([prefers(prompt, new, true) for prompt in request.paraphrases]),
        paraphrase_accuracy=_mean([float(scores[Probe(prompt, new)].is_argmax) for prompt in request.paraphrases]),
        specificity=_mean([prefers(n.prompt, n.answer, new) for n in request.neighbors]),
        neighborhood_accuracy=_mean([float(scores[n].is_argmax) for n in request.neighbors]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
