"""A layer summed anew from its ledger, and a change made again bit for bit.

The recursion never needs it while float32 holds what it must. It does where the covariance or the weight has
drifted, or where edits are to be taken out that were nearly all the state knew of their keys: no downdate can
tell then what would be left.
"""

from collections.abc import Mapping, Sequence

from easyedit_rls.ledger.history import Entry, History
from easyedit_rls.ledger.shards import Shard, without
from easyedit_rls.solvers.base import LayerSolver, flat_rows
from easyedit_rls.solvers.batch import Beginning, batch_solution
from easyedit_rls.solvers.rls import RecursiveLeastSquares


def rebuilt(
    beginning: Beginning,
    current: LayerSolver,
    history: History,
    layer: int,
    removed: Sequence[int] = (),
    shard: int = 0,
) -> LayerSolver:
    """The solution of one layer summed anew, in float64 where the device has it, from where on it stays in
    float64.

    Args:
        beginning: of the layer.
        current: the solution as the recursion has it. Where somebody else's weights were adopted, its weight
            is what to go on from.
        history: the edits, `removed` still among them.
        layer: the layer's number.
        removed: edits that are to be taken out, of that shard.
        shard: the newest one's number.

    Raises:
        NumericalError: the information matrix is not positive definite.
    """
    if not current.can_drift:  # it carries A itself, in float64
        device = current.weight.device
        return current.retract(*history.tensors(removed, [layer], device)[layer]) if removed else current
    device = current.weight.device
    rest = history.plus(Entry("retract", removed=tuple(removed))) if removed else history
    ids = rest.in_shard(shard)
    A, C, W = batch_solution(
        beginning, (part[layer] for part in rest.standing([layer], ids, device)), layer, device
    )
    if history.is_adopted:
        W = current.weight.to(A)
        if removed:
            K, V, D = flat_rows(
                *(tensor.to(A) for tensor in history.tensors(removed, [layer], device)[layer])
            )
            W = W - C @ (K.T @ (D[:, None] * (V - K @ W)))
    watch = None if beginning.watch is None else beginning.watch.to(device).rebuilt(A, W)
    return RecursiveLeastSquares.assemble(C, W, A, watch, len(ids), current.name)


def replayed(
    solutions: Mapping[int, LayerSolver],
    shards: tuple[Shard, ...],
    entry: Entry,
    history: History,
    beginnings: "Mapping[int, Beginning]",
) -> tuple[dict[int, LayerSolver], tuple[Shard, ...], History]:
    """The state after one change more, bit for bit as the editor made it.

    Args:
        solutions: layer -> the state before it.
        shards: the full ones before it.
        entry: the change.
        history: what came before it.
        beginnings: layer -> its beginning; looked up only where a layer is rebuilt.
    """
    layers = list(solutions)
    device = next(iter(solutions.values())).weight.device
    again = layers if entry.kind == "rebuild" else entry.rebuilt
    by_step = [layer for layer in layers if layer not in again]
    by_shard = history.by_shard(entry.removed)
    own = by_shard.pop(len(shards), [])
    gone = history.tensors(own, by_step, device) if own and by_step else {}
    has_tensors = (
        entry.edits or entry.kind == "adopt" or any(factor != 1.0 for factor in entry.factors.values())
    )
    data = entry.data() if has_tensors else {}
    after: dict[int, LayerSolver] = {}
    for layer, solution in solutions.items():
        is_begun = False
        if layer in again:
            solution, is_begun = (
                rebuilt(beginnings[layer], solution, history, layer, own, len(shards)),
                True,
            )
        elif own:
            solution, is_begun = solution.retract(*gone[layer]), True
        if f"K.{layer}" in data:
            K, V, D = (data[name].to(device) for name in (f"K.{layer}", f"V.{layer}", "importance"))
            solution = solution.update(K, V, D, same_change=is_begun, factor=entry.factors[layer])
        if f"K_after.{layer}" in data:
            solution = solution.after_batch(
                data[f"K_after.{layer}"].to(device), data["importance"].to(device)
            )
        if entry.kind == "adopt":
            solution = solution.adopt(data[f"W.{layer}"].to(device))
        after[layer] = solution
    now = history.plus(entry)
    return after, without(shards, by_shard, beginnings, now), now
