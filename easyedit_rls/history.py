"""What was edited: the changes of a state in order, the edits that stand, and how a state is made again from them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, TypeAlias

import torch
from torch import Tensor

from easyedit_rls._version import __version__
from easyedit_rls.errors import RequestError
from easyedit_rls.forgetting import ForgettingLeastSquares
from easyedit_rls.linalg import spd_inverse
from easyedit_rls.recursion import RecursiveLeastSquares, flat_rows
from easyedit_rls.requests import EditRequest

Solution: TypeAlias = RecursiveLeastSquares | ForgettingLeastSquares
Data: TypeAlias = Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Edit:
    """One fact that was edited in.

    Attributes:
        edit_id: its number in the stream, from 1; never used twice.
        request: what was asked for.
        row: its row in the tensors of its entry.
    """

    edit_id: int
    request: EditRequest
    row: int


@dataclass(frozen=True)
class Entry:
    """One change of a state. It never changes, so copies of a state share it.

    Attributes:
        kind: 'edit', 'retract' (edits taken out), 'adopt' (weights that somebody else wrote) or 'rebuild' (the covariance
            computed anew).
        edits: facts edited in.
        removed: numbers of edits taken out by it, before any of its own came in.
        factors: layer -> forgetting factor γ of this batch.
        weights: `weights_fingerprint` of the edited weights after it.
        time: when, ISO 8601, UTC.
        version: of this package.
        data: loads the tensors: ``K.<layer>`` (u, d_k), ``V.<layer>`` (u, d_v), ``importance`` (u,), or with a dimension more, (u, r, …),
            where an edit has r rows (setting `keys`); for 'adopt' ``W.<layer>``.
    """

    kind: str
    edits: tuple[Edit, ...] = ()
    removed: tuple[int, ...] = ()
    factors: Mapping[int, float] = field(default_factory=dict)
    weights: str = ""
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    version: str = __version__
    data: Data = field(default=dict, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Entry":
        return self

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        edits = [{"id": edit.edit_id, "row": edit.row, **edit.request.to_dict()} for edit in self.edits]
        return {
            "kind": self.kind,
            "edits": edits,
            "removed": list(self.removed),
            "factors": {str(layer): factor for layer, factor in self.factors.items()},
            "weights": self.weights,
            "time": self.time,
            "version": self.version,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], data: Data) -> "Entry":
        """The entry that `to_dict` was called on, with its tensors behind `data`."""
        edits = []
        for edit in values["edits"]:
            request = EditRequest.from_dict({key: value for key, value in edit.items() if key not in ("id", "row")})
            edits.append(Edit(edit["id"], request, edit["row"]))
        factors = {int(layer): factor for layer, factor in values["factors"].items()}
        return cls(
            values["kind"], tuple(edits), tuple(values["removed"]), factors, values["weights"], values["time"], values["version"], data
        )


class History:
    """The entries of one stream in order, without those that were rolled back.

    Attributes:
        entries: the changes that stand.
        live: number -> edit, for all edits that are in the objective.
        next_id: number of the next edit.
    """

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.live: dict[int, Edit] = {}
        self.next_id = 1
        self._made_by: dict[int, int] = {}  # edit -> index of its entry
        self._questions: dict[tuple[str, ...], list[int]] = {}

    @property
    def n_batches(self) -> int:
        """Batches of edits taken in."""
        return sum(entry.kind == "edit" for entry in self.entries)

    def add(self, entry: Entry) -> None:
        """Put a change behind the others."""
        self._remove(entry.removed)
        for edit in entry.edits:
            self._made_by[edit.edit_id] = len(self.entries)
            self._insert(edit)
        self.next_id = max([self.next_id, *(edit.edit_id + 1 for edit in entry.edits)])
        self.entries.append(entry)

    def drop_last(self) -> Entry:
        """Take the last change out again; its numbers stay used."""
        entry = self.entries.pop()
        self._remove(edit.edit_id for edit in entry.edits)
        for edit_id in entry.removed:
            made = self.entries[self._made_by[edit_id]]
            self._insert(next(edit for edit in made.edits if edit.edit_id == edit_id))
        return entry

    def conflicts(self, requests: Sequence[EditRequest]) -> list[int]:
        """Numbers of the edits that answer the same prompt as one of the requests, in order."""
        return sorted({edit_id for request in requests for edit_id in self._questions.get(request.question, ())})

    def check(self, edit_ids: Iterable[int]) -> list[int]:
        """The numbers in order, each once.

        Raises:
            RequestError: one of them names no edit that stands.
        """
        wanted = sorted(set(edit_ids))
        unknown = [edit_id for edit_id in wanted if edit_id not in self.live]
        if unknown or not wanted:
            numbers = ", ".join(map(str, unknown)) or "none given"
            has = f"{len(self.live)} edits stand" + (f", numbers {min(self.live)} to {max(self.live)}" if self.live else "")
            raise RequestError(f"no such edit: {numbers}; {has}. `easyedit-rls state log` lists them.", field="edit_ids")
        return wanted

    def tensors(self, edit_ids: Iterable[int], layers: Iterable[int], device: torch.device | None = None) -> dict[int, list[Tensor]]:
        """Keys, targets and what is left of the importances of some edits.

        Returns:
            layer -> [K (u, d_k), V (u, d_v), D (u,)], or with a dimension more (see `Entry.data`), in order of the numbers.
        """
        layers = list(layers)
        by_entry: dict[int, list[int]] = {}
        for edit_id in sorted(edit_ids):
            by_entry.setdefault(self._made_by[edit_id], []).append(self.live[edit_id].row)
        parts: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {layer: [] for layer in layers}
        for index, rows in sorted(by_entry.items()):
            data = self.entries[index].data()
            for layer in layers:
                K, V, D = (data[name][rows].to(device) for name in (f"K.{layer}", f"V.{layer}", "importance"))
                parts[layer].append((K, V, D * self._left(index, layer)))
        return {layer: [torch.cat(column) for column in zip(*rows_of)] for layer, rows_of in parts.items()}

    def _left(self, index: int, layer: int) -> float:
        """What later batches have left of the importances of an entry."""
        left = 1.0
        for entry in self.entries[index + 1 :]:
            left *= entry.factors.get(layer, 1.0)
        return left

    def _insert(self, edit: Edit) -> None:
        self.live[edit.edit_id] = edit
        self._questions.setdefault(edit.request.question, []).append(edit.edit_id)

    def _remove(self, edit_ids: Iterable[int]) -> None:
        for edit_id in edit_ids:
            question = self.live.pop(edit_id).request.question
            self._questions[question].remove(edit_id)
            if not self._questions[question]:
                del self._questions[question]


def replay(solutions: dict[int, Solution], entry: Entry, history: History, prior: Callable[[int], Solution]) -> None:
    """Make one change once more, bit for bit as the editor made it, and put it into the history.

    Args:
        solutions: layer -> the state before it; changed in place.
        entry: the change.
        history: what came before it; the entry is added.
        prior: layer -> the state before the first edit; only called for 'rebuild'.
    """
    device = next(iter(solutions.values())).weight.device
    gone = history.tensors(entry.removed, solutions, device) if entry.removed else {}
    data = entry.data() if entry.edits or entry.kind == "adopt" else {}
    for layer, solution in solutions.items():
        solution.commit()
        if entry.removed:
            solution.retract(*gone[layer], joins_last=True)
        if entry.edits:
            K, V, D = (data[name].to(device) for name in (f"K.{layer}", f"V.{layer}", "importance"))
            solution.update(K, V, D, joins_last=True, factor=entry.factors[layer])
        if entry.kind == "adopt":
            solution.adopt(data[f"W.{layer}"].to(device))
        if entry.kind == "rebuild":
            solutions[layer] = rebuild(prior(layer), solution, history, layer)
    history.add(entry)


def rebuild(prior: Solution, current: Solution, history: History, layer: int) -> Solution:
    """The solution of one layer from its prior and all edits that stand, summed and solved in float64.

    Args:
        prior: the state before the first edit.
        current: the state as the recursion has it: its weight is kept where somebody else's weights were adopted.
        history: the edits.
        layer: the layer's number.

    Raises:
        NumericalError: the information matrix is not positive definite.
    """
    if isinstance(prior, ForgettingLeastSquares) or isinstance(current, ForgettingLeastSquares):
        return current  # it carries A itself, which does not drift
    wide = torch.float64 if prior.weight.device.type != "mps" else torch.float32
    A = spd_inverse(prior.covariance().to(wide), f"Prior covariance of {prior.name}", "Mend the ledger.")
    W_p = prior.weight.to(wide)
    right = torch.zeros_like(W_p)
    n_edits = 0
    for entry in history.entries:
        standing = [edit.edit_id for edit in entry.edits if edit.edit_id in history.live]
        if standing:
            K, V, D = flat_rows(*(tensor.to(wide) for tensor in history.tensors(standing, [layer], prior.weight.device)[layer]))
            A.addmm_(K.T, D[:, None] * K)
            right.addmm_(K.T, D[:, None] * (V - K @ W_p))
            n_edits += len(standing)
    C = spd_inverse(A, f"Information matrix of {prior.name}", "Raise lambda_reg.")
    is_adopted = any(entry.kind == "adopt" for entry in history.entries)
    W = current.weight if is_adopted else (W_p + C @ right).to(prior.weight.dtype)
    return RecursiveLeastSquares.assemble(C.to(prior.weight.dtype), W.clone(), A, n_edits, prior.name)
