"""Looking at a ledger: is every file what it should be, and what do the edits cost the objective?"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from easyedit_rls.errors import NumericalError, RLSEditError
from easyedit_rls.files import PARTIAL
from easyedit_rls.forgetting import ForgettingLeastSquares
from easyedit_rls.history import History, Solution, rebuild
from easyedit_rls.ledger.journal import HEAD, INDEX, Journal
from easyedit_rls.ledger.ledger import journals
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.snapshot import Snapshot, read_prior
from easyedit_rls.linalg import cholesky, spd_inverse
from easyedit_rls.priors import Prior

_ROWS = 512  # edits whose tensors are held at once


@dataclass(frozen=True)
class LayerFigures:
    """One edited layer.

    Attributes:
        layer: its number.
        d_k: width of the keys.
        d_v: width of the outputs.
        deviation: ‖W − W_0‖/‖W_0‖.
        edits_term: Σ d_i ‖k_i W − v_i‖², what the edits still miss (older ones as far as they have not faded).
        deviation_term: λ² ‖W − W_0‖².
        anchor_term: μ² ‖K_0 W − V_0‖².
        drift: relative error of the covariance, seen through probes.
    """

    layer: int
    d_k: int
    d_v: int
    deviation: float
    edits_term: float
    deviation_term: float
    anchor_term: float
    drift: float

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
        weight_error: ‖W − W_batch‖/‖W_batch − W_0‖; None where other people's weights were adopted or edits fade.
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
    for journal_folder in journals(folder):
        try:
            journal = Journal(journal_folder)
        except RLSEditError as exc:
            yield journal_folder, str(exc)
            continue
        yield journal_folder / INDEX, None
        yield journal_folder / HEAD, None
        for name, stamp in journal.stamps().items():
            try:
                journal.read(name, stamp)
                yield journal_folder / name, None
            except RLSEditError as exc:
                yield journal_folder / name, str(exc)


def debris(folder: Path) -> list[Path]:
    """Files that an interrupted writer left behind; the next editor clears them away."""
    left = [path for path in folder.glob(f"*{PARTIAL}")]
    for journal_folder in journals(folder):
        known = {INDEX, HEAD, *Journal(journal_folder).stamps()}
        left += [path for path in journal_folder.iterdir() if path.name not in known]
    return sorted(left)


def layer_figures(prior: Prior, solution: Solution, history: History, layer: int, manifest: Manifest) -> LayerFigures:
    """Deviation and the three terms of the paper's objective at the weight as it is."""
    lambda_reg, mu_reg = float(manifest.objective["lambda_reg"]), float(manifest.objective["mu_reg"])
    W, W_0, W_p = (tensor.double() for tensor in (solution.weight, prior.unedited, prior.solution.weight))
    missed = 0.0
    for ids in _chunks(sorted(history.live)):
        K, V, D = (tensor.double() for tensor in history.tensors(ids, [layer])[layer])
        missed += float((D[..., None] * (K @ W - V).square()).sum())
    deviation = float((W - W_0).square().sum())
    A = _prior_information(prior.solution)
    if prior.anchor_energy is None:  # V_0 = K_0 W_0: the quadratic form of what moved
        anchor = float(((W - W_0) * (A @ (W - W_0))).sum()) - lambda_reg**2 * deviation
    else:
        gram = A - lambda_reg**2 * torch.eye(len(A), dtype=A.dtype)  # μ² K_0ᵀK_0
        cross = A @ W_p - lambda_reg**2 * W_0  # μ² K_0ᵀV_0
        anchor = float((W * (gram @ W)).sum() - 2 * (W * cross).sum()) + mu_reg**2 * prior.anchor_energy
    relative = deviation**0.5 / float(W_0.norm())
    d_k, d_v = W.shape
    return LayerFigures(layer, d_k, d_v, relative, missed, lambda_reg**2 * deviation, max(anchor, 0.0), solution.drift())


def rebuild_figures(journal: Journal, snapshot: Snapshot, layer: int) -> RebuildFigures:
    """Hold the state of one layer against a rebuild from its prior and the edits that stand; costs O(d_k³)."""
    solution, prior = snapshot.solutions[layer], read_prior(journal, layer)
    C = solution.covariance()
    try:
        cholesky(C.double(), f"Covariance of layer {layer}")
        is_definite = True
    except NumericalError:
        is_definite = False
    error = None
    is_comparable = not isinstance(solution, ForgettingLeastSquares) and all(e.kind != "adopt" for e in snapshot.history.entries)
    if is_comparable:
        exact = rebuild(prior.solution, solution, snapshot.history, layer).weight.double()
        size = float((exact - prior.solution.weight.double()).norm())
        error = float((solution.weight.double() - exact).norm()) / size if size > 0 else float((solution.weight.double() - exact).norm())
    return RebuildFigures(layer, torch.equal(C, C.T), is_definite, solution.drift(), error)


def log_rows(journal: Journal) -> list[dict[str, Any]]:
    """A row each edit and each other change, in order, with what became of the edits since."""
    rows: list[dict[str, Any]] = []
    of_edit: dict[int, dict[str, Any]] = {}
    history, entries = History(), iter(journal.entries())
    for line in journal.lines:
        if line.kind == "rollback":
            dropped = history.drop_last()
            for edit_id, status in [*((e.edit_id, "rolled back") for e in dropped.edits), *((i, "stands") for i in dropped.removed)]:
                of_edit[edit_id]["status"] = status
            rows.append({"time": line.time, "kind": "rollback", "edits": [edit.edit_id for edit in dropped.edits]})
        elif line.kind == "entry":
            entry = next(entries)
            history.add(entry)
            common = {"time": entry.time, "kind": entry.kind, "version": entry.version}
            for edit_id in entry.removed:
                of_edit[edit_id]["status"] = "retracted" if entry.kind == "retract" else "superseded"
            if entry.kind != "edit" or entry.removed:
                rows.append({**common, "kind": "supersede" if entry.kind == "edit" else entry.kind, "edits": list(entry.removed)})
            for edit in entry.edits:
                of_edit[edit.edit_id] = {
                    **common,
                    "id": edit.edit_id,
                    "status": "stands",
                    "batch": history.n_batches,
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
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _prior_information(solution: Solution) -> torch.Tensor:
    return spd_inverse(solution.covariance().double(), f"Prior covariance of {solution.name}", "Mend the ledger.")


def _chunks(ids: list[int]) -> Iterator[list[int]]:
    return (ids[i : i + _ROWS] for i in range(0, len(ids), _ROWS))
