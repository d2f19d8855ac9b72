"""What was edited: the changes of a state in order, and the edits that stand."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from easyedit_rls._base.arguments import listed
from easyedit_rls._base.clock import utc_now
from easyedit_rls._version import __version__
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.errors import ArgumentError, RequestError
from easyedit_rls.solvers.watch import widest_dtype

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
class GateEntry:
    """What the gate of a gated memory goes by (`editors.gated`).

    Attributes:
        threshold: τ.
        edits: how many stood when it was taken.
        share: of ordinary tokens above it; None in ledgers of earlier versions.
    """

    threshold: float
    edits: int
    share: float | None = None


@dataclass(frozen=True)
class Entry:
    """One change of a state. It never changes, so copies of a state share it.

    Attributes:
        kind: 'edit', 'retract' (edits taken out), 'adopt' (weights that somebody else wrote), or in ledgers
            of earlier versions 'rebuild' (all layers summed anew).
        edits: facts edited in.
        removed: numbers of edits taken out by it, before any of its own came in.
        rebuilt: layers whose solution was summed anew from the edits that stand, in float64, before its own
            edits came in.
        factors: layer -> forgetting factor γ of this batch.
        weights: `weights_fingerprint` of the edited weights after it.
        gate: after it; None where the memory has none.
        shard: that its edits are in, from 0 (`ledger.shards`).
        time: when, ISO 8601, UTC.
        version: of this package.
        data: loads the tensors: ``K.<layer>`` (u, d_k), ``V.<layer>`` (u, d_v), ``importance`` (u,), or with
            a dimension more, (u, r, …), where an edit has r rows (setting `keys`); ``K_after.<layer>`` for
            rules that look at keys behind the batch; for 'adopt' ``W.<layer>``.
    """

    kind: str
    edits: tuple[Edit, ...] = ()
    removed: tuple[int, ...] = ()
    rebuilt: tuple[int, ...] = ()
    factors: Mapping[int, float] = field(default_factory=dict)
    weights: str = ""
    gate: GateEntry | None = None
    shard: int = 0
    time: str = field(default_factory=utc_now)
    version: str = __version__
    data: Data = field(default=dict, compare=False, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Entry":
        return self

    def loaded(self) -> "Entry":
        """The same with its tensors in memory."""
        tensors = self.data()
        return replace(self, data=lambda: tensors)

    @property
    def is_final(self) -> bool:
        """Whether it can't be rolled back."""
        return self.kind in ("adopt", "rebuild")

    def to_dict(self) -> dict[str, Any]:
        """Everything but the tensors, for JSON."""
        edits = [{"id": edit.edit_id, "row": edit.row, **edit.request.to_dict()} for edit in self.edits]
        return {
            "kind": self.kind,
            "edits": edits,
            "removed": list(self.removed),
            "rebuilt": list(self.rebuilt),
            "factors": {str(layer): factor for layer, factor in self.factors.items()},
            "weights": self.weights,
            **({} if self.gate is None else {"gate": asdict(self.gate)}),
            **({"shard": self.shard} if self.shard else {}),
            "time": self.time,
            "version": self.version,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], data: Data) -> "Entry":
        """The entry that `to_dict` was called on, with its tensors behind `data`."""
        edits = []
        for edit in values["edits"]:
            request = EditRequest.from_dict(
                {key: value for key, value in edit.items() if key not in ("id", "row")}
            )
            edits.append(Edit(edit["id"], request, edit["row"]))
        factors = {int(layer): factor for layer, factor in values["factors"].items()}
        rebuilt = tuple(values.get("rebuilt", ()))  # since format 2
        removed, weights = tuple(values["removed"]), values["weights"]
        gate = GateEntry(**values["gate"]) if "gate" in values else None
        return cls(
            values["kind"],
            tuple(edits),
            removed,
            rebuilt,
            factors,
            weights,
            gate,
            int(values.get("shard", 0)),
            values["time"],
            values["version"],
            data,
        )


@dataclass
class _Index:
    """What stands after some entries: number -> edit, ascending; the index of the entry that made it; and the
    numbers of the edits that answer each question.
    """

    live: dict[int, Edit] = field(default_factory=dict)
    made_by: dict[int, int] = field(default_factory=dict)
    questions: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)

    def add(self, entry: Entry, index: int) -> None:
        """Take one entry in."""
        for edit_id in _standing(entry.removed, self.live) if entry.removed else ():
            question = self.live.pop(edit_id).request.question
            del self.made_by[edit_id]
            self.questions[question] = tuple(other for other in self.questions[question] if other != edit_id)
            if not self.questions[question]:
                del self.questions[question]
        for edit in entry.edits:
            self.live[edit.edit_id], self.made_by[edit.edit_id] = edit, index
            question = edit.request.question
            self.questions[question] = (*self.questions.get(question, ()), edit.edit_id)


@dataclass(frozen=True)
class History:
    """The entries of one stream in order, without those that were rolled back. A value: a change makes a new
    one. What stands is not copied for it, so that a change costs the same however many there were: the new
    one takes it over, and an older one that is asked again makes its own from its entries.

    Attributes:
        entries: the changes that stand.
        next_id: number of the next edit.
        n_batches: batches of edits taken in.
        fingerprints: `weights_fingerprint` after changes that compaction dropped.
    """

    entries: tuple[Entry, ...] = ()
    next_id: int = 1
    n_batches: int = 0
    fingerprints: tuple[str, ...] = ()
    _found: list[_Index] = field(default_factory=list, compare=False, repr=False)  # none once it was taken

    def __deepcopy__(self, memo: dict[int, Any]) -> "History":
        return self

    @property
    def live(self) -> Mapping[int, Edit]:
        """Number -> edit, ascending, for all edits that are in the objective; good until the next change."""
        return self._index.live

    @property
    def _index(self) -> _Index:
        if not self._found:
            index = _Index()
            for number, entry in enumerate(self.entries):
                index.add(entry, number)
            self._found.append(index)
        return self._found[0]

    def plus(self, *entries: Entry) -> "History":
        """With changes more, in order.

        Raises:
            RequestError: one takes out an edit that does not stand, or brings in a number that was used.
        """
        index, next_id = self._index, self.next_id
        self._found.clear()
        for number, entry in enumerate(entries, len(self.entries)):
            for edit in entry.edits:
                if edit.edit_id < next_id:
                    raise RequestError(
                        f"number {edit.edit_id} was used before; the next is {next_id}.", field="edit_ids"
                    )
                next_id = edit.edit_id + 1
            index.add(entry, number)
        n_batches = self.n_batches + sum(entry.kind == "edit" for entry in entries)
        return History((*self.entries, *entries), next_id, n_batches, self.fingerprints, [index])

    def with_entries(self, others: Mapping[int, Entry]) -> "History":
        """The same with other entries in the places of some, by their `id`."""
        entries = tuple(others.get(id(entry), entry) for entry in self.entries)
        return replace(self, entries=entries, _found=[])

    def using(self, next_id: int) -> "History":
        """The same, with numbers below `next_id` used."""
        return replace(self, next_id=next_id, _found=[])

    @property
    def is_adopted(self) -> bool:
        """Whether weights that somebody else wrote are in it."""
        return any(entry.kind == "adopt" for entry in self.entries)

    @property
    def gate(self) -> GateEntry | None:
        """Of the last change."""
        return self.entries[-1].gate if self.entries else None

    def conflicts(self, requests: Sequence[EditRequest]) -> list[int]:
        """Numbers of the edits that answer the same prompt as one of the requests, in order."""
        return sorted(
            {edit_id for request in requests for edit_id in self._index.questions.get(request.question, ())}
        )

    def is_newest(self, edit: Edit) -> bool:
        """Whether no later edit answers the same prompt (on_conflict: keep lets several stand)."""
        return self._index.questions[edit.request.question][-1] == edit.edit_id

    def by_shard(self, edit_ids: Iterable[int]) -> dict[int, list[int]]:
        """Shard -> those of some edits that stand that are in it, in order."""
        found: dict[int, list[int]] = {}
        for edit_id in sorted(edit_ids):
            found.setdefault(self.entries[self._index.made_by[edit_id]].shard, []).append(edit_id)
        return found

    def in_shard(self, number: int) -> list[int]:
        """Edits of a shard that stand, in order."""
        return self.by_shard(self.live).get(number, [])

    def check(self, edit_ids: Iterable[int]) -> list[int]:
        """The numbers in order, each once.

        Raises:
            RequestError: one of them names no edit that stands.
        """
        return _standing(edit_ids, self.live)

    def standing(
        self, layers: Sequence[int], edit_ids: Iterable[int] | None = None, device: torch.device | None = None
    ) -> Iterator[dict[int, list[Tensor]]]:
        """Keys, targets and what is left of the importances of edits that stand, entry after entry, each read
        once.

        Args:
            layers: which layers' tensors.
            edit_ids: which edits; None for all.
            device: where the tensors go.

        Yields:
            layer -> [K (u, d_k), V (u, d_v), D (u,)], or with a dimension more (see `Entry.data`), in order
            of the numbers.
        """
        rows: dict[int, list[int]] = {}
        for edit_id in self.live if edit_ids is None else sorted(edit_ids):
            rows.setdefault(self._index.made_by[edit_id], []).append(self.live[edit_id].row)
        left = self._left(layers)
        for index in sorted(rows):
            data = self.entries[index].data()
            names = {layer: (f"K.{layer}", f"V.{layer}", "importance") for layer in layers}
            found = {layer: [data[name][rows[index]] for name in names[layer]] for layer in layers}
            faded = {layer: _faded(D, left[layer][index], device) for layer, (_, _, D) in found.items()}
            yield {layer: [K.to(device), V.to(device), faded[layer]] for layer, (K, V, _) in found.items()}

    def tensors(
        self, edit_ids: Iterable[int], layers: Sequence[int], device: torch.device | None = None
    ) -> dict[int, list[Tensor]]:
        """The same in one piece: layer -> [K, V, D]."""
        parts = list(self.standing(layers, edit_ids, device))
        return {
            layer: [torch.cat(column) for column in zip(*(part[layer] for part in parts))] for layer in layers
        }

    def _left(self, layers: Sequence[int]) -> dict[int, list[float]]:
        """layer -> what later batches have left of the importances of each entry."""
        left = {layer: [1.0] * len(self.entries) for layer in layers}
        for layer, shares in left.items():
            for index in range(len(self.entries) - 1, 0, -1):
                shares[index - 1] = shares[index] * self.entries[index].factors.get(layer, 1.0)
        return left


def _faded(importance: Tensor, left: float, device: torch.device | None) -> Tensor:
    """What is left of importances; in the widest dtype, since what fades in float64 has to be taken out to
    the last digit.
    """
    if left == 1.0:
        return importance.to(device)
    return (importance.double() * left).to(device, widest_dtype(device or importance.device))


def _standing(edit_ids: Iterable[int], live: Mapping[int, Edit]) -> list[int]:
    """Numbers in order, each once; all of them must be those of edits that stand."""
    given = listed(edit_ids, "edit_ids", "numbers")
    for edit_id in given:
        if isinstance(edit_id, bool) or not isinstance(edit_id, Integral):
            raise ArgumentError(
                f"edit_ids holds {edit_id!r}, a {type(edit_id).__name__}, not the number of an edit."
            )
    wanted = sorted(set(map(int, given)))
    unknown = [edit_id for edit_id in wanted if edit_id not in live]
    if unknown or not wanted:
        numbers = ", ".join(map(str, unknown)) or "none given"
        has = f"{len(live)} edits stand" + (f", numbers {min(live)} to {max(live)}" if live else "")
        raise RequestError(
            f"no such edit: {numbers}; {has}. `easyedit-rls state log` lists them.", field="edit_ids"
        )
    return wanted
