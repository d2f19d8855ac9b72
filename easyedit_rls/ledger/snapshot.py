"""Moments to files and back, bit for bit: the prior before the first edit, and checkpoints."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from easyedit_rls.anchors.prior import LayerStart
from easyedit_rls.errors import LedgerError
from easyedit_rls.ledger.files import pack, parsed
from easyedit_rls.ledger.history import Entry, History
from easyedit_rls.ledger.journal import INDEX, MANIFEST, Event, Journal
from easyedit_rls.ledger.ledger import Ledger, Place
from easyedit_rls.ledger.line import Line
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.rebuild import replayed
from easyedit_rls.ledger.shards import read_shard, shards_before
from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.batch import Beginning
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.rule import Rule

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)


class StoredBeginnings(Mapping[int, Beginning]):
    """What rebuilds begin with, read from a journal when it is asked for.

    Args:
        journal: on disk.
        layers: that it has.
    """

    def __init__(self, journal: Journal, layers: Iterator[int] | Mapping[int, Any]) -> None:
        self._journal, self._layers = journal, tuple(layers)

    def __getitem__(self, layer: int) -> Beginning:
        if layer not in self._layers:
            raise KeyError(layer)
        return read_prior(self._journal, layer).beginning

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def prior_files(priors: Mapping[int, LayerStart]) -> dict[str, bytes]:
    """The priors of all layers as files."""
    files: dict[str, bytes] = {}
    for layer, prior in priors.items():
        tensors = prior.solution.tensors()
        is_unedited = torch.equal(prior.unedited.to(prior.solution.weight), prior.solution.weight)
        if is_unedited and prior.unedited.dtype == prior.solution.weight.dtype:
            tensors.pop("W", None)  # as nearly always: a gate's layer and anchors' own values keep it
        if prior.anchor_energy is not None:
            tensors["anchor_energy"] = torch.tensor([prior.anchor_energy], dtype=torch.float64)
        if prior.beginning.gram is not None:
            tensors["gram"] = prior.beginning.gram.to_vector()
        if prior.beginning.C_0 is None:
            tensors["regularizers"] = torch.tensor(
                [prior.beginning.lambda_reg, prior.beginning.mu_reg], dtype=torch.float64
            )
        files |= {
            _prior_name(layer): pack(tensors, {}),
            _unedited_name(layer): pack({"W": prior.unedited}, {}),
        }
    return files


def read_manifest(journal: Journal) -> Manifest:
    """Whose state the journal holds."""
    return parsed(
        journal.folder / MANIFEST,
        lambda: Manifest.decode(journal.read(MANIFEST), str(journal.folder / MANIFEST)),
    )


def read_prior(journal: Journal, layer: int, device: torch.device | str = "cpu") -> LayerStart:
    """One layer before the first edit."""
    name = _prior_name(layer)
    tensors = journal.load(name, device=device)
    unedited = read_unedited(journal, layer, device)
    energy, gram, regularizers = (tensors.pop(key, None) for key in ("anchor_energy", "gram", "regularizers"))
    rule = read_manifest(journal).rule
    solution, _ = _solutions(rule, {"W": unedited.clone(), **tensors}, layer)
    lambda_reg, mu_reg = (0.0, 0.0) if regularizers is None else regularizers.tolist()
    packed = None if gram is None else PackedSymmetric.from_vector(gram, len(unedited))
    C_0 = (
        PackedSymmetric.from_dense(solution.covariance()) if regularizers is None else None
    )  # a ledger of the first format
    beginning = Beginning(packed, C_0, lambda_reg, mu_reg, solution.weight, solution.watch)
    return LayerStart(solution, unedited, beginning, None if energy is None else float(energy))


def read_unedited(journal: Journal, layer: int, device: torch.device | str = "cpu") -> Tensor:
    """W_0 of one layer, (d_k, d_v), float32."""
    name = _unedited_name(layer)
    if name not in journal.lines[0].files:  # the first ledgers had it with the prior
        name = _prior_name(layer)
    tensors = journal.load(name, device=device)
    return parsed(journal.folder / name, lambda: tensors["W"])


def write_checkpoint(ledger: Ledger, moment: Moment) -> Moment:
    """Store the whole state, so that coming back needs no older entry;
    all but the last two checkpoints go.
    """
    place, _ = ledger.record(moment.place, checkpoint_event(moment, moment.place.position.n_lines))
    assert place.folder is not None
    for files in place.position.checkpoints[:-2]:
        for name in files:
            try:
                (place.folder / name).unlink(missing_ok=True)
            except OSError as exc:  # as good as there: it is not read any more
                logger.warning("An old checkpoint could not be removed: %s", exc)
    return replace(moment, place=place)


def checkpoint_event(moment: Moment, number: int) -> Event:
    """The whole state, to be written down as the line of that number."""
    before = {} if moment.before is None else moment.before.solutions
    files = {
        f"checkpoint-{number:06d}-layer-{layer}.safetensors": pack(solution.tensors(before.get(layer)), {})
        for layer, solution in moment.solutions.items()
    }
    return Event(Line("checkpoint"), files)


def read_history(journal: Journal) -> History:
    """The edits, without touching a tensor."""
    return parsed_history(journal, len(journal.lines))[0]


def parsed_history(journal: Journal, n_lines: int) -> tuple[History, History | None]:
    """The edits after some lines of the index, and those that a roll-back would lead to."""
    standing: list[Entry] = []
    can_go_back, next_id = False, 1
    for line in journal.lines[:n_lines]:
        if line.kind == "entry":
            entry = journal.entry(line)
            standing.append(entry)
            can_go_back, next_id = (
                not entry.is_final,
                max([next_id, *(edit.edit_id + 1 for edit in entry.edits)]),
            )
        elif line.kind == "rollback":
            if not can_go_back:
                raise LedgerError(
                    f"{journal.folder / INDEX} is damaged: it rolls back what can't be. {_BACKUP}"
                )
            standing.pop()
            can_go_back = False
        elif line.kind == "checkpoint":
            can_go_back &= not _is_loose(journal, line)
            next_id = max(next_id, _first_id(journal))
    before = _beginning(journal).plus(*standing[:-1])
    return before.plus(*standing[-1:]).using(next_id), before if can_go_back else None


def read_moment(
    journal: Journal,
    devices: Mapping[int, torch.device] | None = None,
    *,
    from_start: bool = False,
    progress: "tqdm[Any] | None" = None,
) -> Moment:
    """The state after the last event, bit for bit: the last checkpoint, then every change after it once more.

    Args:
        journal: on disk.
        devices: layer -> where its state shall live; the CPU if None.
        from_start: make every change once more from the prior on, without looking at a checkpoint.
        progress: a bar to advance by the changes made.

    Raises:
        LedgerError: a file is damaged, or does not hold what it should.
    """
    return parsed(journal.folder, lambda: _read(journal, devices, from_start, progress))


def _read(
    journal: Journal,
    devices: Mapping[int, torch.device] | None,
    from_start: bool,
    progress: "tqdm[Any] | None",
) -> Moment:
    manifest = read_manifest(journal)
    rule = manifest.rule
    if devices is None:
        devices = {int(layer): torch.device("cpu") for layer in manifest.widths}
    unedited = {layer: read_unedited(journal, layer, device) for layer, device in devices.items()}
    place = Place(journal.folder, journal.position)
    beginnings = StoredBeginnings(journal, devices)
    start = 1 if from_start else len(journal.lines) - journal.position.since_checkpoint
    history, history_before = parsed_history(journal, start)
    before: Mapping[int, LayerSolver] | None = None
    if journal.lines[start - 1].kind == "checkpoint":
        pairs = {}
        for name, stamp in journal.lines[start - 1].files.items():
            layer = int(name.rsplit("-", 1)[1].split(".")[0])
            pairs[layer] = _solutions(rule, journal.load(name, stamp, devices[layer]), layer)
        solutions: Mapping[int, LayerSolver] = {layer: pairs[layer][0] for layer in devices}
        found = {layer: pair[1] for layer, pair in pairs.items() if pair[1] is not None}
        before = found if len(found) == len(devices) and history_before is not None else None
    else:
        solutions = {layer: read_prior(journal, layer, device).solution for layer, device in devices.items()}
    templates = tuple(manifest.templates)
    moment = Moment(solutions, unedited, beginnings, templates, history, None, (), place)
    moment = replace(moment, shards=shards_before(journal, start, devices, beginnings, history))
    if before is not None and history_before is not None:
        earlier = replace(moment, solutions=before, history=history_before)
        shards = shards_before(journal, start, devices, beginnings, history_before, is_rolled_back=True)
        moment = replace(moment, before=replace(earlier, shards=shards))
    if progress is not None:
        progress.update(start)
    for line in journal.lines[start:]:
        moment = _replayed(journal, line, moment, devices)
        if progress is not None:
            progress.update()
    n_full = sum(shard.n_edits for shard in moment.shards)
    if any(one.n_edits + n_full != len(moment.history.live) for one in moment.solutions.values()):
        raise LedgerError(
            f"{journal.folder} is damaged: its state and its list of edits do not hold the same number "
            f"of them. {_BACKUP}"
        )
    return moment


def _replayed(journal: Journal, line: Line, moment: Moment, devices: Mapping[int, torch.device]) -> Moment:
    """One event more."""
    if line.kind == "entry":
        entry = journal.entry(line)
        solutions, shards, history = replayed(
            moment.solutions, moment.shards, entry, moment.history, moment.beginnings
        )
        return moment.changed(solutions, shards, history, moment.place, is_final=entry.is_final)
    if line.kind == "shard":
        return moment.with_shard(read_shard(journal, line, devices), moment.place)
    if line.kind == "rollback":
        if moment.before is None:
            raise LedgerError(f"{journal.folder / INDEX} is damaged: it rolls back what can't be. {_BACKUP}")
        return moment.rolled_back(moment.place)
    return moment


def _beginning(journal: Journal) -> History:
    values = journal.lines[0].entry
    return History(
        n_batches=int(values.get("n_batches", 0)),
        fingerprints=tuple(map(str, values.get("fingerprints", ()))),
    )


def _first_id(journal: Journal) -> int:
    """Number of the first edit that came after the journal was begun; compaction puts edits with lower ones
    before that.
    """
    return int(journal.lines[0].entry.get("next_id", 1))


def _is_loose(journal: Journal, line: Line) -> bool:
    """Whether a checkpoint's last change may be another one than the last entry: so it was after compaction
    in the first format.
    """
    first = next(other for other in journal.lines if other.kind == "checkpoint")
    return line is first and _first_id(journal) > 1 and "n_batches" not in journal.lines[0].entry


def _solutions(
    rule: Rule, tensors: Mapping[str, Tensor], layer: int
) -> tuple[LayerSolver, LayerSolver | None]:
    try:
        return rule.from_tensors(tensors, f"layer {layer}")
    except KeyError as exc:
        raise LedgerError(
            f"The state of layer {layer} lacks {exc}. It was written by another version of the package."
        ) from exc


def _prior_name(layer: int) -> str:
    return f"prior-layer-{layer}.safetensors"


def _unedited_name(layer: int) -> str:
    return f"unedited-layer-{layer}.safetensors"


_BACKUP = "Put it back from a backup."
