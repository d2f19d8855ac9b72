"""Teacher-forced scores of answers, batched: the one forward pass behind all metrics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.model.capture import undisturbed
from easyedit_rls.model.forward import chunks, device_of, pad, run
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
    return score_rows(model, rows, batch_tokens=batch_tokens, desc=desc, show_progress=show_progress)


def score_rows(
    model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int = 8192, desc: str = "scoring", show_progress: bool | None = None
) -> list[Score]:
    """Score the targets of tokenised rows; like `score`.

    A row whose tokens another row begins with is read off that one's pass, so two answers to one prompt often cost one.
    """
    members = _share([row.ids[:-1] for row in rows])
    texts, scores = list(members), dict[int, Score]()
    with undisturbed(model), progress_bar(len(rows), desc, "text", show_progress) as bar:
        for group in chunks([len(text) for text in texts], batch_tokens, model.dtype):
            asked = [(i, r) for r, g in enumerate(group) for i in members[texts[g]]]
            wanted = [(r, at, token) for i, r in asked for at, token in enumerate(rows[i].target, rows[i].target_start - 1)]
            nll, top = _rate(model, [texts[g] for g in group], wanted)
            start = 0
            for i, _ in asked:
                end = start + len(rows[i].target)
                scores[i] = _score(nll[start:end], top[start:end], rows[i].target)
                start = end
            bar.update(len(asked))
    return [scores[i] for i in range(len(rows))]


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


def _rate(model: PreTrainedModel, texts: Sequence[_Ids], wanted: Sequence[tuple[int, int, int]]) -> tuple[list[float], list[int]]:
    """Run texts; of each (text, position, token): the token's NLL as the output there, and the most probable token."""
    device, head = device_of(model), model.get_output_embeddings()
    places = sorted({(r, at) for r, at, _ in wanted})
    number = {place: k for k, place in enumerate(places)}
    which, where = (torch.tensor(column, device=device) for column in zip(*places))

    def pick(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][which, where][None], *args[1:])

    hook = head.register_forward_pre_hook(pick)
    try:
        logits = run(model, pad(texts, "right", device)).logits[0].float()
    finally:
        hook.remove()
    row = torch.tensor([number[r, at] for r, at, _ in wanted], device=device)
    token = torch.tensor([token for _, _, token in wanted], device=device)
    nll = logits.logsumexp(1)[row] - logits[row, token]
    return nll.tolist(), logits.argmax(1)[row].tolist()


def _score(nll: Sequence[float], top: Sequence[int], target: Sequence[int]) -> Score:
    hits = sum(a == b for a, b in zip(top, target))
    return Score(nll=sum(nll) / len(nll), is_argmax=hits == len(target), accuracy=hits / len(target), predicted=tuple(top))
