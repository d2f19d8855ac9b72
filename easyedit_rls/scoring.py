"""Teacher-forced scores of answers, batched: the one forward pass behind all metrics."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.model.capture import undisturbed
from easyedit_rls.model.forward import Batch, chunks, device_of, pad, run
from easyedit_rls.model.subject import Row, tokenize_answer
from easyedit_rls.progress import progress_bar
from easyedit_rls.requests import Probe

_Ids = tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """How a model rates one answer.

    Attributes:
        nll: mean negative log-likelihood of its tokens, nats.
        is_argmax: whether each of its tokens is the most probable one, given those before it.
        accuracy: share of its tokens that are.
        predicted: the most probable token where each of its tokens stands.
    """

    nll: float
    is_argmax: bool
    accuracy: float
    predicted: tuple[int, ...]


def score(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    batch_tokens: int = 8192,
    desc: str = "scoring",
    show_progress: bool | None = None,
) -> list[Score]:
    """Score each probe's answer behind its prompt.

    A text that another one begins with is read off that one's pass, so two answers to one prompt often cost one.

    Args:
        model: the model; logits are computed where an answer stands only.
        tok: its tokenizer.
        probes: prompts with answers.
        batch_tokens: tokens in one pass, at most.
        desc: label of the progress bar.
        show_progress: None shows a bar on a terminal only.

    Returns:
        A score each probe, in order.
    """
    rows = [tokenize_answer(tok, probe.prompt, probe.answer) for probe in probes]
    scores: dict[int, Score] = {}

    def take(numbers: list[int], logits: Tensor, places: Tensor) -> None:
        wide = logits.float()
        tokens = torch.tensor([token for i in numbers for token in rows[i].target], device=logits.device)
        nll = iter((wide.logsumexp(1)[places] - wide[places, tokens]).tolist())
        top = iter(_top(logits)[places].tolist())
        for i in numbers:
            target = rows[i].target
            scores[i] = _score(list(islice(nll, len(target))), tuple(islice(top, len(target))), target)

    _run_rows(model, rows, take, batch_tokens, desc, show_progress)
    return [scores[i] for i in range(len(rows))]


def predict_rows(
    model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int = 8192, desc: str = "scoring", show_progress: bool | None = None
) -> list[tuple[int, ...]]:
    """The most probable token where each token of tokenised rows' targets stands: `Score.predicted` alone, in a little less time."""
    predicted: dict[int, tuple[int, ...]] = {}

    def take(numbers: list[int], logits: Tensor, places: Tensor) -> None:
        top = iter(_top(logits)[places].tolist())
        for i in numbers:
            predicted[i] = tuple(islice(top, len(rows[i].target)))

    _run_rows(model, rows, take, batch_tokens, desc, show_progress)
    return [predicted[i] for i in range(len(rows))]


def _run_rows(
    model: PreTrainedModel,
    rows: Sequence[Row],
    take: Callable[[list[int], Tensor, Tensor], None],
    batch_tokens: int,
    desc: str,
    show_progress: bool | None,
) -> None:
    """Run rows; `take` gets of each pass the numbers of the rows that it answers, logits, (places, vocabulary), and which of these stand
    before each of those rows' target tokens in turn."""
    device = device_of(model)
    members = _share([row.ids[:-1] for row in rows])
    texts = list(members)
    with undisturbed(model), progress_bar(len(rows), desc, "text", show_progress) as bar:
        for group in chunks([len(text) for text in texts], batch_tokens, model.dtype):
            asked = [(i, r) for r, g in enumerate(group) for i in members[texts[g]]]
            wanted = [(r, rows[i].target_start - 1 + k) for i, r in asked for k in range(len(rows[i].target))]
            places = sorted(set(wanted))
            number = {place: n for n, place in enumerate(places)}
            logits = _logits(model, pad([texts[g] for g in group], "right", device), places)
            take([i for i, _ in asked], logits, torch.tensor([number[place] for place in wanted], device=logits.device))
            bar.update(len(asked))


def _share(texts: Iterable[_Ids]) -> dict[_Ids, list[int]]:
    """Text -> numbers of the texts that are it or its beginning, so that each number stands with one of the longest texts."""
    numbers: dict[_Ids, list[int]] = {}
    for i, text in enumerate(texts):
        numbers.setdefault(text, []).append(i)
    shared: dict[_Ids, list[int]] = {}
    longer: _Ids = ()
    for text in sorted(numbers, reverse=True):  # a text comes straight after those that begin with it
        if longer[: len(text)] != text:
            longer = text
        shared.setdefault(longer, []).extend(numbers[text])
    return shared


def _logits(model: PreTrainedModel, batch: Batch, places: Sequence[tuple[int, int]]) -> Tensor:
    """Run a batch; the logits at these (row, position) alone, (places, vocabulary)."""
    head = model.get_output_embeddings()
    which, where = (torch.tensor(column, device=batch.ids.device) for column in zip(*places))

    def pick(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][which, where][None], *args[1:])

    hook = head.register_forward_pre_hook(pick)
    try:
        logits: Tensor = run(model, batch).logits[0]
    finally:
        hook.remove()
    return logits


def _top(logits: Tensor) -> Tensor:
    """Each row's most probable token, (rows,); `max` takes a CPU half of `argmax`'s time, and gives the first of equals as well."""
    return logits.max(1).indices


def accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of a target's tokens that were predicted."""
    return sum(a == b for a, b in zip(predicted, target, strict=True)) / len(target)


def _score(nll: Sequence[float], top: tuple[int, ...], target: tuple[int, ...]) -> Score:
    return Score(nll=sum(nll) / len(nll), is_argmax=top == target, accuracy=accuracy(top, target), predicted=top)
