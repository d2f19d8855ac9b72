"""Looking at a ledger: is every file what it should be, and what do the edits cost the objective?"""

import contextlib
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easyedit_rls.anchors.prior import LayerStart
from easyedit_rls.errors import NumericalError, RLSEditError
from easyedit_rls.evaluation.objective import Terms, objective
from easyedit_rls.ledger.files import read_part
from easyedit_rls.ledger.history import History
from easyedit_rls.ledger.journal import ENTRIES, HEAD, INDEX, Journal
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.reading import POINTER, journals, newest, read_pointer
from easyedit_rls.ledger.snapshot import read_prior
from easyedit_rls.ledger.tidy import leftovers, tails
from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.batch import batch_solution
from easyedit_rls.solvers.fill import exact_fill
from easyedit_rls.solvers.spd import cholesky


@dataclass(frozen=True)
class LayerFigures:
    """One edited layer.

    Attributes:
        layer: its number.
        d_k: width of the keys.
        d_v: width of the outputs.
        deviation: ‖W − W_0‖/‖W_0‖.
        edits_term: Σ d_i ‖k_i W − v_i‖², what the edits still miss (older ones as far as they have not
            faded).
        deviation_term: λ² ‖W − W_0‖².
        anchor_term: μ² ‖K_0 W − V_0‖².
        drift: relative error of the covariance, seen through probes.
        fill: how much of the layer's memory the edits have taken, 1 − tr(C_t A_0)/d_k (`solvers.fill`); None
            for rules without such a memory.
        deviation_bound: what `deviation` can't exceed, √J_t(W_0)/(λ ‖W_0‖), since the solution costs no more
            than the unedited weight, J_t(W_t) ≤ J_t(W_0); None where λ is 0, the rule solves another
            problem, or somebody else's weights were adopted.
    """

    layer: int
    d_k: int
    d_v: int
    deviation: float
    edits_term: float
    deviation_term: float
    anchor_term: float
    drift: float
    fill: float | None
    deviation_bound: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class RebuildFigures:
    """How far the recursion of one layer is from the batch solution of the edits that stand, in float64.

    Attributes:
        layer: its number.
        is_symmetric: whether C is, exactly.
        is_positive_definite: whether C is.
        drift: relative error of the covariance, seen through probes.
        weight_error: ‖W − W_batch‖/‖W_batch − W_0‖, the edits that stand counted as far as they have not
            faded; None where other people's weights were adopted.
    """

    layer: int
    is_symmetric: bool
    is_positive_definite: bool
    drift: float
    weight_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def check_files(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Every file of a ledger with what is wrong with it, None for nothing."""
    pointer = folder / POINTER
    if pointer.exists() or pointer.is_symlink():
        yield pointer, _problem(lambda: (read_pointer(folder), newest(folder)))
    for journal_folder in journals(folder):
        try:
            journal = Journal(journal_folder)
        except RLSEditError as exc:
            yield journal_folder, str(exc)
            continue
        yield journal_folder / INDEX, None
        yield journal_folder / HEAD, None
        for name, stamp in journal.stamps().items():
            yield journal_folder / name, _problem(partial(journal.read, name, stamp))
        records = [line.record for line in journal.lines if line.record is not None]
        found = (_problem(partial(read_part, journal_folder / ENTRIES, *at)) for at in records)
        if records:
            yield journal_folder / ENTRIES, next((problem for problem in found if problem is not None), None)


def unexpected(folder: Path) -> list[str]:
    """What has no place in a ledger, or lies behind the last event that counts; the next editor sets it
    aside.
    """
    in_use = newest(folder)
    behind = [] if in_use is None else [f"{path} from byte {n_bytes} on" for path, n_bytes in tails(in_use)]
    return [*map(str, leftovers(folder, in_use)), *behind]


def layer_figures(
    prior: LayerStart,
    solution: LayerSolver,
    history: History,
    layer: int,
    manifest: Manifest,
    shard: int = 0,
) -> LayerFigures:
    """Deviation and the three terms of the paper's objective at the weight as it is."""
    lambda_reg, mu_reg = float(manifest.objective["lambda_reg"]), float(manifest.objective["mu_reg"])
    W, W_0, W_p = (tensor.double() for tensor in (solution.weight, prior.unedited, prior.solution.weight))
    gram = cross = None
    if mu_reg > 0:
        gram = prior.beginning.information(torch.device("cpu"))  # λ²I + μ² K_0ᵀK_0
        gram.diagonal().sub_(lambda_reg**2)
        gram /= mu_reg**2
        if prior.anchor_energy is not None:  # K_0ᵀV_0, since W_p solves the problem without edits
            cross = gram @ W_p + (lambda_reg / mu_reg) ** 2 * (W_p - W_0)

    ids = history.in_shard(shard)

    def terms_at(weight: Tensor) -> Terms:
        edits = (part[layer] for part in history.standing([layer], ids))
        return objective(weight, W_0, edits, gram, lambda_reg, mu_reg, cross, prior.anchor_energy or 0.0)

    terms = terms_at(W)
    relative = float((W - W_0).norm() / W_0.norm())
    bound = None
    if lambda_reg > 0 and solution.solves_objective and not history.is_adopted:
        bound = terms_at(W_0).total ** 0.5 / lambda_reg / float(W_0.norm())
    d_k, d_v = W.shape
    return LayerFigures(
        layer,
        d_k,
        d_v,
        relative,
        terms.edits,
        terms.deviation,
        terms.anchors,
        solution.drift(),
        exact_fill(solution, prior.beginning),
        bound,
    )


def rebuild_figures(journal: Journal, moment: Moment, layer: int) -> RebuildFigures:
    """Hold the state of one layer against the batch problem of the edits that stand; costs O(d_k³)."""
    solution, prior = moment.solutions[layer], read_prior(journal, layer)
    C = solution.covariance()
    try:
        cholesky(C.double(), f"Covariance of layer {layer}")
        is_definite = True
    except NumericalError:
        is_definite = False
    error = None
    if not moment.history.is_adopted:
        ids, device = moment.history.in_shard(len(moment.shards)), torch.device("cpu")
        edits = (part[layer] for part in moment.history.standing([layer], ids, device))
        _, _, exact = batch_solution(prior.beginning, edits, layer, torch.device("cpu"))
        missing, size = (float((exact - W.double()).norm()) for W in (solution.weight, prior.solution.weight))
        error = missing / size if size > 0 else missing
    return RebuildFigures(layer, torch.equal(C, C.T), is_definite, solution.drift(), error)


def log_rows(journal: Journal) -> list[dict[str, Any]]:
    """A row each edit and each other change, in order, with what became of the edits since."""
    rows: list[dict[str, Any]] = []
    of_edit: dict[int, dict[str, Any]] = {}
    n_batches, last = int(journal.lines[0].entry.get("n_batches", 0)), None
    for line in journal.lines:
        if line.kind == "rollback" and last is not None:
            for edit_id, status in [
                *((e.edit_id, "rolled back") for e in last.edits),
                *((i, "stands") for i in last.removed),
            ]:
                of_edit[edit_id]["status"] = status
            n_batches -= last.kind == "edit"
            rows.append(
                {"time": line.time, "kind": "rollback", "edits": [edit.edit_id for edit in last.edits]}
            )
        elif line.kind == "entry":
            entry = last = journal.entry(line)
            n_batches += entry.kind == "edit"
            common = {"time": entry.time, "kind": entry.kind, "version": entry.version}
            for edit_id in entry.removed:
                of_edit[edit_id]["status"] = "retracted" if entry.kind == "retract" else "superseded"
            if entry.kind != "edit" or entry.removed:
                rows.append(
                    {
                        **common,
                        "kind": "supersede" if entry.kind == "edit" else entry.kind,
                        "edits": list(entry.removed),
                    }
                )
            for edit in entry.edits:
                of_edit[edit.edit_id] = {
                    **common,
                    "id": edit.edit_id,
                    "status": "stands",
                    "batch": n_batches,
                    "prompt": edit.request.prompt,
                    "subject": edit.request.subject,
                    "target_new": edit.request.target,
                    "importance": edit.request.importance,
                    "case_id": edit.request.case_id,
                }
                rows.append(of_edit[edit.edit_id])
    return rows


def size_on_disk(folder: Path) -> int:
    """Bytes of all files of a ledger."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # a writer removed it meanwhile
            found = path.lstat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def _problem(look: Callable[[], object]) -> str | None:
    try:
        look()
    except RLSEditError as exc:
        return str(exc)
    return None
