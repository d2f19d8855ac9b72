"""One journal: an append-only index, the tensors of all changes, checkpoints, and the head that says how far
all that counts.

    index.jsonl                          a line each event, with the SHA-256 and size of what it brought
    entries.bin                          keys, targets, importances of all changes, a safetensors record each,
                                         one behind the other
    head.json                            format, how many lines count, their length and SHA-256:
                                         the commit point
    manifest.json                        whose state it is (see `manifest`)
    unedited-layer-3.safetensors         the weight before the first edit
    prior-layer-3.safetensors            the state before the first edit, and what a rebuild begins with
    checkpoint-000040-layer-3.safetensors  the state after 40 lines of the index;
                                         the last two checkpoints are kept

An event counts from the moment the new head is renamed into place. Whatever lies behind it on disk, whole or
torn, was never reported as done: it is ignored, and set aside by the next writer. In format 1 each change had
a file of its own, ``entry-000001.safetensors``.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_rls._base.files import Stamp, sync_folder, write_all, write_file
from easyedit_rls.errors import LedgerError
from easyedit_rls.ledger.files import (
    canonical,
    open_regular,
    pack,
    parsed,
    read_file,
    read_part,
    read_small,
    unpack,
)
from easyedit_rls.ledger.history import Entry
from easyedit_rls.ledger.line import Line, size_of

FORMAT = 2
INDEX, ENTRIES, HEAD, MANIFEST = "index.jsonl", "entries.bin", "head.json", "manifest.json"
SPARE = "head.json.before"
_LONGEST_LINE = 1 << 26  # bytes, when read; what is written is far below
_MOST_TEXT = 1 << 23  # bytes of a change's texts; escaped, as in the record, they are up to six times as long


@dataclass(frozen=True)
class Position:
    """How far a journal goes: all that its writer must know to go on.

    Attributes:
        head: bytes of the head.
        digest: SHA-256 of the index so far.
        n_lines: events.
        n_index: bytes of the index.
        n_data: bytes of the tensors.
        since_checkpoint: events since the last checkpoint, or since the beginning.
        checkpoints: files of the last checkpoints, the last one at the end.
        is_closed: whether all edits were forgotten: what comes next begins a new journal.
    """

    head: bytes = b""
    digest: Any = field(default_factory=hashlib.sha256, compare=False)
    n_lines: int = 0
    n_index: int = 0
    n_data: int = 0
    since_checkpoint: int = 0
    checkpoints: tuple[tuple[str, ...], ...] = ()
    is_closed: bool = False

    def after(self, line: Line, encoded: bytes) -> "Position":
        """The position one line further on."""
        digest = self.digest.copy()
        digest.update(encoded)
        n_lines, n_index = self.n_lines + 1, self.n_index + len(encoded)
        n_data = self.n_data if line.record is None else line.record[0] + line.record[1].n_bytes
        since = 0 if line.kind in ("begin", "checkpoint") else self.since_checkpoint + 1
        checkpoints = (
            (*self.checkpoints, tuple(line.files)) if line.kind == "checkpoint" else self.checkpoints
        )
        head = _head_of(n_lines, n_index, digest.hexdigest())
        return Position(head, digest, n_lines, n_index, n_data, since, checkpoints[-3:], line.kind == "reset")


class Journal:
    """One journal on disk as it is at one moment. Reading needs no lock; writing does (see `Ledger`).

    Args:
        folder: of the journal.

    Attributes:
        folder: of the journal.
        lines: the events that count.
        position: how far it goes.

    Raises:
        LedgerError: index or head are missing or damaged, or of a later version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.is_symlink():
            raise LedgerError(
                f"{folder} is a link. The journals of a ledger must be its own: put the folder itself there."
            )
        raw, head = read_head(folder)
        self.lines: list[Line] = []
        self.position = Position()
        path, n_bytes = folder / INDEX, head["index_bytes"]
        try:
            with open(open_regular(path), "rb") as index:
                while self.position.n_index < n_bytes:
                    encoded = index.readline(min(n_bytes - self.position.n_index, _LONGEST_LINE))
                    if not encoded.endswith(b"\n"):
                        break
                    line = parsed(path, partial(Line.decode, encoded))
                    self.lines.append(line)
                    self.position = self.position.after(line, encoded)
        except LedgerError:
            raise
        except OSError as exc:
            raise LedgerError(
                f"{path} can't be read: {exc.strerror}. Put it back from a backup, or mend the permissions."
            ) from exc
        if self.position.n_index != n_bytes or self.position.digest.hexdigest() != head["index_sha256"]:
            raise LedgerError(f"{path} is damaged: it is not what {HEAD} says. Put both back from a backup.")
        if len(self.lines) != head["lines"]:
            raise LedgerError(
                f"{folder / HEAD} is damaged: it counts {head['lines']} lines of {len(self.lines)}. {_BACKUP}"
            )
        if [line.kind for line in self.lines].count("begin") != 1 or self.lines[0].kind != "begin":
            raise LedgerError(f"{path} is damaged: it does not begin as a journal does. {_BACKUP}")
        self.position = replace(self.position, head=raw)

    @property
    def is_closed(self) -> bool:
        """Whether all edits were forgotten: what comes next begins a new journal."""
        return self.position.is_closed

    def stamps(self) -> dict[str, Stamp]:
        """Files that must be there: all but those of checkpoints before the last."""
        last = max((i for i, line in enumerate(self.lines) if line.kind == "checkpoint"), default=None)
        kept = (line for i, line in enumerate(self.lines) if line.kind != "checkpoint" or i == last)
        return {name: stamp for line in kept for name, stamp in line.files.items()}

    def known_names(self) -> set[str]:
        """Every name in the folder that this package gave."""
        names = {name for line in self.lines for name in line.files}
        return {INDEX, ENTRIES, HEAD, SPARE, *names}

    def read(self, name: str, stamp: Stamp | None = None) -> bytes:
        """The content of a file that the beginning brought, checked."""
        if stamp is None and name not in self.lines[0].files:
            raise LedgerError(f"{self.folder / INDEX} names no {name}. {_BACKUP}")
        return read_file(self.folder / name, self.lines[0].files[name] if stamp is None else stamp)

    def load(self, name: str, stamp: Stamp | None = None, device: Any = "cpu") -> dict[str, Tensor]:
        """The tensors of a file, checked."""
        return unpack(self.folder / name, self.read(name, stamp), device)

    def entry(self, line: Line) -> Entry:
        """The change that a line tells of; its tensors stay on disk until they are asked for."""
        return entry_of(self.folder, line)

    def entries(self) -> list[Entry]:
        """Every change ever made, in order."""
        return [self.entry(line) for line in self.lines if line.kind == "entry"]


def entry_of(folder: Path, line: Line) -> Entry:
    """The change that a line of a journal tells of."""
    return parsed(folder / INDEX, lambda: Entry.from_dict(line.entry, partial(_load, folder, line)))


def _load(folder: Path, line: Line) -> dict[str, Tensor]:
    """The tensors of a change."""
    found: dict[str, Tensor] = {}
    if line.record is not None:
        offset, stamp = line.record
        found = unpack(folder / ENTRIES, read_part(folder / ENTRIES, offset, stamp))
    for name, stamp in line.files.items():  # format 1
        found |= unpack(folder / name, read_file(folder / name, stamp))
    rows = [edit["row"] for edit in line.entry["edits"]]
    if any(
        not 0 <= row < len(tensor)
        for row in rows
        for name, tensor in found.items()
        if not name.startswith("W.")
    ):
        raise LedgerError(
            f"{folder / INDEX} is damaged: it tells of more edits than {folder / ENTRIES} holds. {_BACKUP}"
        )
    return found


def create(
    folder: Path, files: Mapping[str, bytes], beginning: Mapping[str, Any]
) -> tuple[Position, list[Line]]:
    """Write a new journal into a folder that nobody knows of yet; its head is the caller's affair.

    Args:
        folder: to be made.
        files: manifest and prior.
        beginning: what the history begins with.
    """
    folder.mkdir()
    return prepare(folder, Position(), [Event(Line("begin", entry=beginning), files)])


@dataclass(frozen=True)
class Event:
    """What is to be written down.

    Attributes:
        line: the event; stamps are put in when it is written.
        files: name -> content of the files that it brings.
        data: its tensors, packed; None for none.
    """

    line: Line
    files: Mapping[str, bytes] = field(default_factory=dict)
    data: bytes | None = None


def prepare(folder: Path, at: Position, events: Sequence[Event]) -> tuple[Position, list[Line]]:
    """Write all that events bring, but for the head: nothing of it counts yet.

    Returns:
        Where the journal is to be, and the lines as they were written.
    """
    lines, encoded, data, end = [], [], [], at
    for event in events:
        files = {name: write_file(folder / name, content) for name, content in event.files.items()}
        record = None
        if event.data is not None:
            record = (end.n_data, Stamp(hashlib.sha256(event.data).hexdigest(), len(event.data)))
            data.append(event.data)
        line = replace(event.line, files=files, record=record)
        encoded.append(line.encode())
        if len(encoded[-1]) > _MOST_TEXT and line.kind == "entry":
            raise LedgerError(
                f"The texts of the batch take {len(encoded[-1]) / 1e6:.0f} MB, "
                f"and a ledger takes {_MOST_TEXT / 1e6:.0f} MB at once. "
                "Edit fewer facts a batch, or leave out what is for evaluation alone."
            )
        lines.append(line)
        end = end.after(line, encoded[-1])
    if data:
        _write_behind(folder / ENTRIES, at.n_data, b"".join(data))
    _write_behind(folder / INDEX, at.n_index, b"".join(encoded))
    return end, lines


def put_back(folder: Path, at: Position) -> None:
    """Make a journal end where it ended, whatever came behind."""
    if read_small(folder / HEAD) != at.head:
        restore(folder / HEAD, folder / SPARE, at.head)
    for name, n_bytes in ((INDEX, at.n_index), (ENTRIES, at.n_data)):
        if tail_of(folder / name, n_bytes):
            _write_behind(folder / name, n_bytes, b"")


def tail_of(path: Path, n_bytes: int) -> int:
    """Bytes of a file behind the first `n_bytes`; 0 where there is no file."""
    return max(0, path.stat().st_size - n_bytes) if path.exists() else 0


def commit_file(path: Path, spare: Path, content: bytes, before: bytes | None) -> None:
    """Replace a small file in one moment, its content before kept under a second name: to go back takes no
    room on a full disk.
    """
    spare.unlink(missing_ok=True)
    if before is not None:
        try:
            os.link(path, spare)
        except OSError:  # a file system without hard links
            write_file(spare, before)
    write_file(path, content)


def restore(path: Path, spare: Path, content: bytes) -> None:
    """Undo `commit_file`."""
    if spare.exists() and read_small(spare) == content:
        os.replace(spare, path)
        sync_folder(path.parent)
    else:
        write_file(path, content)


def entry_event(entry: Entry, data: Mapping[str, Tensor]) -> Event:
    """A change, to be written down with its tensors if it has any."""
    text = entry.to_dict()
    return Event(
        Line("entry", entry=text, time=entry.time),
        data=pack(data, {"entry": json.dumps(text)}) if data else None,
    )


def read_head(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The head of a journal, as bytes and as values.

    Raises:
        LedgerError: it is missing or damaged, or of a later version.
    """
    path = folder / HEAD
    raw = read_small(path)
    head = parsed(path, lambda: json.loads(raw))
    if isinstance(head, dict) and isinstance(head.get("format", 1), int) and head.get("format", 1) > FORMAT:
        raise LedgerError(
            f"{path} has format {head['format']}; this version reads up to {FORMAT}. "
            "Use the package that wrote it."
        )
    if not isinstance(head, dict) or raw not in _heads_like(head):
        raise LedgerError(f"{path} is damaged. Put it back from a backup.")
    return raw, head


def _heads_like(head: Mapping[str, Any]) -> tuple[bytes, ...]:
    """What a head with these values looks like, in this format and in the first."""
    try:
        values = size_of(head["lines"]), size_of(head["index_bytes"]), str(head["index_sha256"])
    except (KeyError, ValueError):
        return ()
    old = canonical({"lines": values[0], "index_bytes": values[1], "index_sha256": values[2]})
    return (_head_of(*values), old)


def _head_of(n_lines: int, n_bytes: int, sha256: str) -> bytes:
    return canonical({"format": FORMAT, "lines": n_lines, "index_bytes": n_bytes, "index_sha256": sha256})


def _write_behind(path: Path, offset: int, content: bytes) -> None:
    handle = open_regular(path, os.O_RDWR | os.O_CREAT)
    if (
        os.fstat(handle).st_nlink > 1
    ):  # a file under a second name is somebody else's too: this one gets a copy of its own
        os.close(handle)
        with open(path, "rb") as whole:
            write_file(path, whole.read(offset))
        handle = open_regular(path, os.O_RDWR)
    try:
        os.truncate(handle, offset)
        os.lseek(handle, offset, os.SEEK_SET)
        write_all(handle, content)
        os.fsync(handle)
    finally:
        os.close(handle)


_BACKUP = "Put it back from a backup."
