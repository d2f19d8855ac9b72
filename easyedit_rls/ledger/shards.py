"""Shards: a gated memory that is full goes on in a new one, with a covariance and weights of its own.

A shard is the same least-squares problem, from the prior on, with the edits that were made in it. The newest
is the running solution. Of those before it the weights are kept, and the information A_t of the lowest layer,
which is all that a gate goes by (`model.gate`). An edit is taken out of one of these by summing it anew from
the edits that stand.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError
from easyedit_rls.ledger.files import pack, parsed
from easyedit_rls.ledger.history import History
from easyedit_rls.ledger.journal import Event, Journal
from easyedit_rls.ledger.line import Line
from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.batch import Beginning, batch_solution
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from easyedit_rls.solvers.watch import widest_dtype


@dataclass(frozen=True)
class Shard:
    """A shard that no edits go to any more.

    Attributes:
        weights: layer -> W_t, (d_k, d_v), float32.
        information: A_t of the lowest layer, (d_k, d_k), in the widest dtype of its device.
        n_edits: edits in it.
    """

    weights: Mapping[int, Tensor]
    information: Tensor
    n_edits: int


def filled(solutions: Mapping[int, LayerSolver]) -> Shard:
    """The shard that running solutions leave, layer -> solution."""
    lowest = solutions[min(solutions)]
    weights = {layer: solution.weight.float().clone() for layer, solution in solutions.items()}
    return Shard(weights, lowest.information(), lowest.n_edits)


def fresh(
    solutions: Mapping[int, LayerSolver], beginnings: Mapping[int, Beginning], unedited: Mapping[int, Tensor]
) -> dict[int, LayerSolver]:
    """The solutions that a new shard begins with: the prior's, as before the first edit.

    Args:
        solutions: layer -> the solution of the shard before it.
        beginnings: layer -> its beginning.
        unedited: layer -> W_0, (d_k, d_v).
    """
    begun: dict[int, LayerSolver] = {}
    for layer, solution in solutions.items():
        beginning, device = beginnings[layer], solution.weight.device
        dtype = widest_dtype(device) if layer == min(solutions) else unedited[layer].dtype
        gram = None if beginning.gram is None else beginning.gram.to_dense().to(device)
        W_p = beginning.W_p.to(device, dtype)
        prior = Prior(W_p, gram, beginning.lambda_reg, beginning.mu_reg, name=solution.name)
        begun[layer] = RecursiveLeastSquares(prior)
    return begun


def summed_anew(
    number: int,
    shard: Shard,
    beginnings: Mapping[int, Beginning],
    history: History,
) -> Shard:
    """A shard with its edits that stand, summed in the widest dtype.

    Args:
        number: the shard's.
        shard: as it was.
        beginnings: layer -> its beginning.
        history: without the edits that were taken out.

    Raises:
        NumericalError: the information matrix is not positive definite, or weights were adopted.
    """
    if history.is_adopted:
        raise NumericalError(
            f"Weights that somebody else wrote were adopted, so shard {number + 1}, which is full, can't be "
            "summed anew. Only edits of the newest one can be taken out."
        )
    ids, device = history.in_shard(number), shard.information.device
    weights, information = {}, shard.information
    for layer in shard.weights:
        edits = (part[layer] for part in history.standing([layer], ids, device))
        A, _, W = batch_solution(beginnings[layer], edits, layer, device)
        weights[layer] = W.float().to(shard.weights[layer].device)
        if layer == min(shard.weights):
            information = A
    return Shard(weights, information, len(ids))


def without(
    shards: Sequence[Shard],
    removed: Mapping[int, Sequence[int]],
    beginnings: Mapping[int, Beginning],
    rest: History,
) -> tuple[Shard, ...]:
    """Shards without some edits.

    Args:
        shards: in order.
        removed: shard -> numbers of the edits that are gone; the newest, running one may be among them.
        beginnings: layer -> its beginning.
        rest: the history without these edits.
    """
    return tuple(
        summed_anew(number, shard, beginnings, rest) if removed.get(number) else shard
        for number, shard in enumerate(shards)
    )


def shard_event(shard: Shard, number: int) -> Event:
    """That a new shard begins, with the one before it, to be written down as the line of that number."""
    files = {}
    for layer, W in shard.weights.items():
        tensors = {"W": W}
        if layer == min(shard.weights):
            tensors |= {
                "A": PackedSymmetric.from_dense(shard.information).to_vector(),
                "n_edits": torch.tensor([shard.n_edits]),
            }
        files[f"shard-{number:06d}-layer-{layer}.safetensors"] = pack(tensors, {})
    return Event(Line("shard"), files)


def read_shard(journal: Journal, line: Line, devices: Mapping[int, torch.device]) -> Shard:
    """The shard that a line closed.

    Args:
        journal: on disk.
        line: of kind 'shard'.
        devices: layer -> where its state lives.
    """
    layers = {int(name.rsplit("-", 1)[1].split(".")[0]): name for name in line.files}
    tensors = {
        layer: journal.load(name, line.files[name], devices[layer]) for layer, name in sorted(layers.items())
    }
    lowest = tensors[min(tensors)]

    def read() -> Shard:
        A = PackedSymmetric.from_vector(lowest["A"], len(lowest["W"])).to_dense()
        return Shard({layer: part["W"] for layer, part in tensors.items()}, A, int(lowest["n_edits"]))

    return parsed(journal.folder / layers[min(tensors)], read)


def shards_before(
    journal: Journal,
    n_lines: int,
    devices: Mapping[int, torch.device],
    beginnings: Mapping[int, Beginning],
    history: History,
    *,
    is_rolled_back: bool = False,
) -> tuple[Shard, ...]:
    """The shards that were full after some lines of the index, without what was taken out of them since.

    Args:
        journal: on disk.
        n_lines: how many lines count.
        devices: layer -> where its state lives.
        beginnings: layer -> its beginning.
        history: after these lines.
        is_rolled_back: whether the last change does not count.
    """
    shards: list[Line] = []
    shard_of: dict[int, int] = {}
    changes: list[tuple[int, set[int]]] = []  # of each: its shard, and those that it took edits out of
    for line in journal.lines[:n_lines]:
        if line.kind == "shard":
            shards.append(line)
        elif line.kind == "entry":
            entry = journal.entry(line)
            shard_of |= {edit.edit_id: entry.shard for edit in entry.edits}
            changes.append((entry.shard, {shard_of[i] for i in entry.removed} - {entry.shard}))
        elif line.kind == "rollback":
            del shards[changes.pop()[0] :]  # one that was begun behind it is gone too
    if is_rolled_back:
        del shards[changes.pop()[0] :]
    stale = set().union(*(taken for _, taken in changes))
    removed = {number: [number] for number in stale}
    return without([read_shard(journal, line, devices) for line in shards], removed, beginnings, history)
