"""CounterFact's metrics (Meng et al. 2022, section 3.4), and their argmax counterparts."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.data.requests import EditRequest, Probe, parse_requests
from easyedit_rls.evaluation.scores import Score, score
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.subject import answer_rows


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

    P is the likelihood of an answer, the geometric mean over its tokens, under teacher forcing; "argmax"
    means that every token of the answer is the most probable one.

    Attributes:
        efficacy: how often P(new) > P(true) on the edited prompt (ES).
        rewrite_accuracy: how often the new answer is the argmax on the edited prompt.
        generalization: how often P(new) > P(true) on paraphrases, averaged within a record first (PS).
        paraphrase_accuracy: how often the new answer is the argmax on paraphrases.
        specificity: how often P(true) > P(new) on neighborhood prompts (NS).
        neighborhood_accuracy: how often the true answer is the argmax on neighborhood prompts.
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


METRICS = (
    "efficacy",
    "rewrite_accuracy",
    "generalization",
    "paraphrase_accuracy",
    "specificity",
    "neighborhood_accuracy",
)


def evaluate(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any] | EditRequest] | Mapping[str, Any] | EditRequest,
    *,
    chat_template: bool = False,
    batch_tokens: int = 8192,
    show_progress: bool | None = None,
) -> Evaluation:
    """Measure how a model answers the records' prompts, their paraphrases and their neighbors.

    Args:
        model: edited or not.
        tok: its tokenizer.
        records: one or a list: EasyEdit's dicts or CounterFact records.
        chat_template: make every prompt, paraphrase and neighbor a user's turn in the tokenizer's chat
            template.
        batch_tokens: tokens in one pass, at most.
        show_progress: None shows a bar on a terminal only.

    Raises:
        RequestError: a record is incomplete, or a text of it is longer than the model's table of positions;
            names the record.
        ModelError: a token is none of the model's.
    """
    requests = parse_requests(records, chat_template=chat_template)
    askers = _askers(requests)
    found = score(
        model,
        tok,
        list(askers),
        numbers=list(askers.values()),
        batch_tokens=batch_tokens,
        desc="evaluating",
        show_progress=show_progress,
    )
    scores = dict(zip(askers, found))
    return summarize([_record_scores(request, scores) for request in requests])


def refuse_unfit_records(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> None:
    """See that `evaluate` can measure requests, without running the model; raises what it would."""
    askers = _askers(requests)
    numbers = list(askers.values())
    refuse_unfit(model, tok, [row.ids for row in answer_rows(tok, list(askers), numbers)], numbers)


def _askers(requests: Sequence[EditRequest]) -> dict[Probe, int]:
    """Everything that the requests' figures need scored, each once, with the number of the first request that
    asks it.
    """
    askers: dict[Probe, int] = {}
    for number, request in enumerate(requests):
        for probe in _probes(request):
            askers.setdefault(probe, number)
    return askers


def summarize(records: Sequence[RecordScores]) -> Evaluation:
    """Means over records; those that lack a figure don't count for it."""
    means = {name: _mean([getattr(record, name) for record in records]) for name in METRICS}
    return Evaluation(**means, records=tuple(records))


def _probes(request: EditRequest) -> list[Probe]:
    """Everything the record's figures need scored."""
    prompts = [request.prompt, *request.paraphrases]
    wanted = [request.probe(prompt, request.target) for prompt in prompts]
    if request.target_true is not None:
        wanted += [request.probe(prompt, request.target_true) for prompt in prompts]
    return (
        wanted
        + list(request.neighbors)
        + [replace(neighbor, answer=request.target) for neighbor in request.neighbors]
    )


def _record_scores(request: EditRequest, scores: Mapping[Probe, Score]) -> RecordScores:
    def prefers(probe: Probe, other: str | None) -> float | None:
        """Which of two answers is the likelier; none can be, where they are the same."""
        if other is None or probe.answer.strip() == other.strip():
            return None
        return float(scores[probe].nll < scores[replace(probe, answer=other)].nll)

    rewrite = request.probe(request.prompt, request.target)
    rephrased = [request.probe(prompt, request.target) for prompt in request.paraphrases]
    return RecordScores(
        case_id=request.case_id,
        efficacy=prefers(rewrite, request.target_true),
        rewrite_accuracy=float(scores[rewrite].is_argmax),
        generalization=_mean([prefers(probe, request.target_true) for probe in rephrased]),
        paraphrase_accuracy=_mean([float(scores[probe].is_argmax) for probe in rephrased]),
        specificity=_mean([prefers(neighbor, request.target) for neighbor in request.neighbors]),
        neighborhood_accuracy=_mean([float(scores[n].is_argmax) for n in request.neighbors]),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
