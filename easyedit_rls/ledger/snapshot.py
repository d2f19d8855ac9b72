"""States to files and back, bit for bit: the prior before the first edit, and checkpoints."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from easyedit_rls.errors import LedgerError
from easyedit_rls.forgetting import ForgettingLeastSquares
from easyedit_rls.history import History, Solution, replay
from easyedit_rls.ledger.files import pack
from easyedit_rls.ledger.journal import MANIFEST, Journal, Line
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.priors import Prior
from easyedit_rls.recursion import RecursiveLeastSquares

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What a journal holds.

    Attributes:
        solutions: layer -> the state after the last event.
        unedited: layer -> W_0.
        history: the edits.
    """

    solutions: dict[int, Solution]
    unedited: dict[int, Tensor]
    history: History


def prior_files(priors: Mapping[int, Prior]) -> dict[str, bytes]:
    """The priors of all layers as files."""
    files: dict[str, bytes] = {}
    for layer, prior in priors.items():
        tensors = prior.solution.tensors()
        if torch.equal(prior.unedited, prior.solution.weight):
            del tensors["W"]  # as good as always: only anchors with values of their own move it
        if prior.anchor_energy is not None:
            tensors["anchor_energy"] = torch.tensor([prior.anchor_energy], dtype=torch.float64)
        files |= {_prior_name(layer): pack(tensors, {}), _unedited_name(layer): pack({"W": prior.unedited}, {})}
    return files


def read_manifest(journal: Journal) -> Manifest:
    """Whose state the journal holds."""
    return Manifest.decode(journal.read(MANIFEST), str(journal.folder / MANIFEST))


def read_prior(journal: Journal, layer: int, device: torch.device | str = "cpu") -> Prior:
    """One layer before the first edit."""
    tensors = journal.load(_prior_name(layer), device=device)
    unedited = read_unedited(journal, layer, device)
    energy = tensors.pop("anchor_energy", None)
    solution = _solution({"W": unedited.clone(), **tensors}, layer)
    return Prior(solution, unedited, None if energy is None else float(energy))


def read_unedited(journal: Journal, layer: int, device: torch.device | str = "cpu") -> Tensor:
    """W_0 of one layer, (d_k, d_v), float32."""
    return journal.load(_unedited_name(layer), device=device)["W"]


def write_checkpoint(journal: Journal, solutions: Mapping[int, Solution]) -> None:
    """Write the state as it is now, so that coming back needs no older entry; older checkpoints go."""
    number = len(journal.lines)
    files = {f"checkpoint-{number:06d}-layer-{layer}.safetensors": pack(s.tensors(), {}) for layer, s in solutions.items()}
    journal.append(Line("checkpoint", {}, {}, datetime.now(timezone.utc).isoformat(timespec="seconds")), files)
    journal.remove_old_checkpoints()


def lines_since_checkpoint(journal: Journal) -> int:
    """Events after the last checkpoint, or after the beginning."""
    kinds = [line.kind for line in journal.lines]
    return next(i for i, kind in enumerate(reversed(kinds)) if kind in ("checkpoint", "begin"))


def read_history(journal: Journal) -> History:
    """The edits, without touching a tensor."""
    history = _fresh_history(journal)
    entries = iter(journal.entries())
    for line in journal.lines:
        if line.kind == "entry":
            history.add(next(entries))
        elif line.kind == "rollback":
            history.drop_last()
    return history


def read_state(
    journal: Journal, devices: Mapping[int, torch.device] | None = None, *, from_start: bool = False, progress: "tqdm[Any] | None" = None
) -> Snapshot:
    """The state after the last event, bit for bit: the last checkpoint, then every change after it once more.

    Args:
        journal: on disk.
        devices: layer -> where its state shall live; the CPU if None.
        from_start: make every change once more from the prior on, without looking at a checkpoint.
        progress: a bar to advance by the changes made.

    Raises:
        LedgerError: a file is damaged.
    """
    if devices is None:
        devices = {int(layer): torch.device("cpu") for layer in read_manifest(journal).widths}
    unedited = {layer: read_unedited(journal, layer, device) for layer, device in devices.items()}
    solutions: dict[int, Solution] = {}
    start = 1 if from_start else len(journal.lines) - lines_since_checkpoint(journal)
    if journal.lines[start - 1].kind == "checkpoint":
        for name, stamp in journal.lines[start - 1].files.items():
            layer = int(name.rsplit("-", 1)[1].split(".")[0])
            solutions[layer] = _solution(journal.load(name, stamp, devices[layer]), layer)
    else:
        solutions = {layer: read_prior(journal, layer, device).solution for layer, device in devices.items()}
    history = _fresh_history(journal)
    entries = iter(journal.entries())
    for i, line in enumerate(journal.lines):
        if line.kind == "entry" and i < start:
            history.add(next(entries))
        elif line.kind == "entry":
            replay(solutions, next(entries), history, lambda layer: read_prior(journal, layer, devices[layer]).solution)
        elif line.kind == "rollback":
            history.drop_last()
            for solution in solutions.values() if i >= start else ():
                solution.rollback()
        if progress is not None:
            progress.update()
    return Snapshot(solutions, unedited, history)


def _fresh_history(journal: Journal) -> History:
    history = History()
    history.next_id = journal.lines[0].entry.get("next_id", 1)
    return history


def _solution(tensors: Mapping[str, Tensor], layer: int) -> Solution:
    kind = ForgettingLeastSquares if "P" in tensors else RecursiveLeastSquares
    try:
        return kind.from_tensors(tensors, f"layer {layer}")
    except KeyError as exc:
        raise LedgerError(f"The state of layer {layer} lacks {exc}. It was written by another version of the package.") from exc


def _prior_name(layer: int) -> str:
    return f"prior-layer-{layer}.safetensors"


def _unedited_name(layer: int) -> str:
    return f"unedited-layer-{layer}.safetensors"
