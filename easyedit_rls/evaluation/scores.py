"""Teacher-forced scores of answers, batched: the one forward pass behind all metrics."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.progress import progress_bar
from easyedit_rls.data.requests import Probe
from easyedit_rls.model.attached_memory import prompts_of, reads_prompts
from easyedit_rls.model.batching import device_of, logits_at, pack_batches, pass_overhead
from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.prefix_tree import Tree, grow, takes_trees, tree_batch
from easyedit_rls.model.subject import Row, answer_rows

_Ids = tuple[int, ...]

# tokens of a row of texts; wider rows share little more, and attention pays for what a token does not see
_WIDTH = 48
_FEW = 8  # texts that aren't worth the two short passes that tell whether a model takes trees


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
    numbers: Sequence[int] | None = None,
    batch_tokens: int = 8192,
    desc: str = "scoring",
    show_progress: bool | None = None,
) -> list[Score]:
    """Score each probe's answer behind its prompt.

    What texts have in common at their beginnings is run once where the model lets it (`prefix_tree`), so a
    second answer to a prompt costs its own tokens only.

    Args:
        model: the model; logits are computed where an answer stands only.
        tok: its tokenizer.
        probes: prompts with answers.
        numbers: for errors, the number of the record that each belongs to; None: each its own.
        batch_tokens: tokens in one pass, at most.
        desc: label of the progress bar.
        show_progress: None shows a bar on a terminal only.

    Returns:
        A score each probe, in order.

    Raises:
        RequestError: an answer has no token of its own, or a text is longer than the model's table of
            positions.
        ModelError: a token is none of the model's.
    """
    rows = answer_rows(tok, probes, numbers)
    refuse_unfit(model, tok, [row.ids for row in rows], numbers)
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
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    batch_tokens: int = 8192,
    desc: str = "scoring",
    show_progress: bool | None = None,
) -> list[tuple[int, ...]]:
    """The most probable token where each token of tokenized rows' targets stands: `Score.predicted` alone, in
    a little less time.
    """
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
    """Run rows; `take` gets of each pass the numbers of the rows that it answers, logits, (places,
    vocabulary), and which of these stand before each of those rows' target tokens in turn.
    """
    askers: dict[_Ids, list[int]] = {}
    for i, row in enumerate(rows):
        askers.setdefault(row.ids[:-1], []).append(i)
    with undisturbed(model), progress_bar(len(rows), desc, "text", show_progress) as bar:
        price = pass_overhead(device_of(model), model.dtype)
        if reads_prompts(model):  # what a prompt is decides what the model says: each has a row of its own
            trees, asked_of = _apart(rows)
        else:
            is_packed = len(askers) > _FEW and takes_trees(model, max(map(len, askers)))
            trees = grow(askers, min(_WIDTH, batch_tokens) if is_packed else 0)
            asked_of = [[(i, path) for t, path in tree.paths.items() for i in askers[t]] for tree in trees]
        for group in pack_batches([len(tree.ids) for tree in trees], batch_tokens, price):
            asked = [(i, r, path) for r, g in enumerate(group) for i, path in asked_of[g]]
            wanted = [
                (r, path[rows[i].target_start - 1 + k])
                for i, r, path in asked
                for k in range(len(rows[i].target))
            ]
            places = sorted(set(wanted))
            number = {place: n for n, place in enumerate(places)}
            prompts = [rows[asked_of[g][0][0]].target_start for g in group]
            with prompts_of(model, prompts):
                logits = logits_at(model, tree_batch([trees[g] for g in group], model), places)
            take(
                [i for i, _, _ in asked],
                logits,
                torch.tensor([number[place] for place in wanted], device=logits.device),
            )
            bar.update(len(asked))


def _apart(rows: Sequence[Row]) -> tuple[list[Tree], list[list[tuple[int, list[int]]]]]:
    """A tree for each prompt with what stands behind it, and which rows it answers by which path."""
    askers: dict[tuple[_Ids, int], list[int]] = {}
    for i, row in enumerate(rows):
        askers.setdefault((row.ids[:-1], row.target_start), []).append(i)
    trees = [Tree() for _ in askers]
    paths = [tree.add(text, ()) for tree, (text, _) in zip(trees, askers)]
    return trees, [[(i, path) for i in numbers] for path, numbers in zip(paths, askers.values())]


def _top(logits: Tensor) -> Tensor:
    """Each row's most probable token, (rows,); `max` takes a CPU half of `argmax`'s time, and gives the first
    of equals as well.
    """
    return logits.max(1).indices


def accuracy(predicted: Sequence[int], target: Sequence[int]) -> float:
    """Share of a target's tokens that were predicted."""
    return sum(a == b for a, b in zip(predicted, target, strict=True)) / len(target)


def _score(nll: Sequence[float], top: tuple[int, ...], target: tuple[int, ...]) -> Score:
    return Score(
        nll=sum(nll) / len(nll), is_argmax=top == target, accuracy=accuracy(top, target), predicted=top
    )
