"""One journal: an append-only index, a file for each change, checkpoints, and the head that says how far all that counts.

    index.jsonl                          a line each event, with the SHA-256 and size of the files it brought
    head.json                            how many lines count, their length and SHA-256: the commit point
    manifest.json                        whose state it is (see `manifest`)
    unedited-layer-3.safetensors         the weight before the first edit
    prior-layer-3.safetensors            the state before the first edit
    entry-000001.safetensors             keys, targets, importances of a change; its text in the metadata
    checkpoint-000040-layer-3.safetensors  the state after 40 lines of the index

An event counts from the moment the new head is renamed into place. Whatever lies behind it on disk, whole or torn, was never reported
as done: it is ignored, and cleared away by the next writer.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from easyedit_rls.errors import LedgerError
from easyedit_rls.files import Stamp, write_all, write_file
from easyedit_rls.history import Entry
from easyedit_rls.ledger.files import pack, read_file, unpack

logger = logging.getLogger(__name__)

INDEX, HEAD, MANIFEST = "index.jsonl", "head.json", "manifest.json"
_SPARE = "head.json.before"


@dataclass(frozen=True)
class Line:
    """One event.

    Attributes:
        kind: 'begin', 'entry', 'rollback', 'checkpoint' or 'reset'.
        files: name -> stamp of the files it brought.
        entry: for 'entry', what `Entry.to_dict` gave; else empty.
        time: ISO 8601, UTC.
    """

    kind: str
    files: Mapping[str, Stamp]
    entry: Mapping[str, Any]
    time: str

    def encode(self) -> bytes:
        """The line as bytes."""
        files = {name: [stamp.sha256, stamp.n_bytes] for name, stamp in self.files.items()}
        return _canonical({"kind": self.kind, "time": self.time, "files": files, "entry": self.entry})

    @classmethod
    def decode(cls, raw: bytes) -> "Line":
        """The line that `encode` gave."""
        values = json.loads(raw)
        files = {name: Stamp(sha256, n_bytes) for name, (sha256, n_bytes) in values["files"].items()}
        return cls(values["kind"], files, values["entry"], values["time"])


class Journal:
    """One journal on disk. Reading needs no lock; writing does (see `Ledger`).

    Args:
        folder: of the journal.

    Attributes:
        folder: of the journal.
        lines: the events that count.

    Raises:
        LedgerError: index or head are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw, head = self._read_head()
        content = _read(folder / INDEX)[: head["index_bytes"]]
        self._digest = hashlib.sha256(content)
        if len(content) != head["index_bytes"] or self._digest.hexdigest() != head["index_sha256"]:
            raise LedgerError(f"{folder / INDEX} is damaged: it is not what {HEAD} says. Put both back from a backup.")
        self.lines = [Line.decode(line) for line in content.splitlines()]
        if len(self.lines) != head["lines"]:
            raise LedgerError(
                f"{folder / HEAD} is damaged: it counts {head['lines']} lines of {len(self.lines)}. Put it back from a backup."
            )
        self._n_bytes = len(content)
        self._head = raw
        self._is_broken = False
        self._broken_files: Collection[str] = ()

    @classmethod
    def create(cls, folder: Path, files: Mapping[str, bytes], next_id: int = 1) -> "Journal":
        """Write a new journal into a folder that nobody knows of yet.

        Args:
            folder: to be made.
            files: manifest and prior.
            next_id: number of the first edit to come.
        """
        folder.mkdir()
        stamps = {name: write_file(folder / name, content) for name, content in files.items()}
        index = Line("begin", stamps, {"next_id": next_id}, datetime.now(timezone.utc).isoformat(timespec="seconds")).encode()
        write_file(folder / INDEX, index)
        write_file(folder / HEAD, _head_of(1, len(index), hashlib.sha256(index).hexdigest()))
        return cls(folder)

    @property
    def n_entries(self) -> int:
        """Changes ever made, those that were rolled back too."""
        return sum(line.kind == "entry" for line in self.lines)

    @property
    def is_closed(self) -> bool:
        """Whether all edits were forgotten: what comes next begins a new journal."""
        return self.lines[-1].kind == "reset"

    def stamps(self) -> dict[str, Stamp]:
        """Files that must be there: all but those of checkpoints before the last."""
        last = max((i for i, line in enumerate(self.lines) if line.kind == "checkpoint"), default=None)
        kept = (line for i, line in enumerate(self.lines) if line.kind != "checkpoint" or i == last)
        return {name: stamp for line in kept for name, stamp in line.files.items()}

    def read(self, name: str, stamp: Stamp | None = None) -> bytes:
        """The content of a file that the index knows, checked."""
        return read_file(self.folder / name, self.stamps()[name] if stamp is None else stamp)

    def load(self, name: str, stamp: Stamp | None = None, device: Any = "cpu") -> dict[str, Tensor]:
        """The tensors of a file that the index knows, checked."""
        return unpack(self.folder / name, self.read(name, stamp), device)

    def entries(self) -> list[Entry]:
        """Every change ever made, in order; its tensors stay on disk until they are asked for."""
        return [self._entry(line) for line in self.lines if line.kind == "entry"]

    def append_entry(self, entry: Entry, data: Mapping[str, Tensor]) -> Entry:
        """Add a change; returns it with its tensors on disk."""
        name, content = _entry_file(self.n_entries + 1, entry, data)
        return self._entry(self.append(Line("entry", {}, entry.to_dict(), entry.time), {name: content}))

    def append(self, line: Line, files: Mapping[str, bytes] | None = None) -> Line:
        """Add an event with its files: when this returns it is on disk, and if it raises the journal is as before.

        Raises:
            LedgerError: the disk is full, read only or failing.
        """
        if self._is_broken:
            self._undo(self._broken_files)
            if self._is_broken:
                raise LedgerError(f"The ledger in {self.folder} still can't be written. Make room or mend the permissions, then try again.")
        files = files or {}
        before = self._digest, self._n_bytes, self._head, len(self.lines)
        try:
            stamps = {name: write_file(self.folder / name, content) for name, content in files.items()}
            line = Line(line.kind, stamps, line.entry, line.time)
            encoded = line.encode()
            digest = self._digest.copy()
            digest.update(encoded)
            self._append_to_index(encoded)
            head = _head_of(len(self.lines) + 1, self._n_bytes + len(encoded), digest.hexdigest())
            self._keep_spare_head()
            write_file(self.folder / HEAD, head)
            (self.folder / _SPARE).unlink(missing_ok=True)
            self._digest, self._n_bytes, self._head = digest, self._n_bytes + len(encoded), head
            self.lines.append(line)
        except BaseException as exc:
            self._digest, self._n_bytes, self._head, n_lines = before
            del self.lines[n_lines:]
            self._undo(list(files))
            if isinstance(exc, OSError):
                raise LedgerError(
                    f"The ledger in {self.folder} can't be written: {exc.strerror or exc}. Nothing was changed; make room or mend the "
                    "permissions, then edit again."
                ) from exc
            raise
        return line

    def clear_debris(self) -> None:
        """Remove what an interrupted writer left behind the head. Only for the holder of the lock."""
        with open(self.folder / INDEX, "r+b") as handle:
            handle.truncate(self._n_bytes)
        known = {INDEX, HEAD, *self.stamps()}
        for path in self.folder.iterdir():
            if path.name not in known:
                path.unlink()

    def remove_old_checkpoints(self) -> None:
        """Remove the files of all checkpoints but the last."""
        for name in {name for line in self.lines for name in line.files} - self.stamps().keys():
            (self.folder / name).unlink(missing_ok=True)

    def _append_to_index(self, encoded: bytes) -> None:
        handle = os.open(self.folder / INDEX, os.O_WRONLY)
        try:
            os.lseek(handle, self._n_bytes, os.SEEK_SET)  # over whatever a failed append may have left
            write_all(handle, encoded)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _keep_spare_head(self) -> None:
        """A second name for the head that counts now: to go back to it takes no room on a full disk."""
        (self.folder / _SPARE).unlink(missing_ok=True)
        try:
            os.link(self.folder / HEAD, self.folder / _SPARE)
        except OSError:  # a file system without hard links
            write_file(self.folder / _SPARE, self._head)

    def _undo(self, files: Collection[str]) -> None:
        """Back to the last head; where the disk doesn't allow even that, it is tried again before the next event."""
        self._is_broken, self._broken_files = True, files
        try:
            if (self.folder / HEAD).read_bytes() != self._head:
                os.replace(self.folder / _SPARE, self.folder / HEAD)
            (self.folder / _SPARE).unlink(missing_ok=True)
            os.truncate(self.folder / INDEX, self._n_bytes)
            for name in files:
                (self.folder / name).unlink(missing_ok=True)
            self._is_broken = False
        except OSError as exc:
            logger.warning("The ledger in %s could not be put back: %s", self.folder, exc)

    def _entry(self, line: Line) -> Entry:
        ((name, stamp),) = line.files.items()
        return Entry.from_dict(line.entry, lambda: self.load(name, stamp))

    def _read_head(self) -> tuple[bytes, dict[str, Any]]:
        path = self.folder / HEAD
        raw = _read(path)
        try:
            head = json.loads(raw)
            if raw == _head_of(head["lines"], head["index_bytes"], head["index_sha256"]):
                return raw, head
        except (ValueError, KeyError, TypeError):
            pass
        raise LedgerError(f"{path} is damaged. Put it back from a backup.")


def _entry_file(number: int, entry: Entry, data: Mapping[str, Tensor]) -> tuple[str, bytes]:
    text = json.dumps(entry.to_dict())
    return f"entry-{number:06d}.safetensors", pack(data, {"entry": text})


def _head_of(n_lines: int, n_bytes: int, sha256: str) -> bytes:
    return _canonical({"lines": n_lines, "index_bytes": n_bytes, "index_sha256": sha256})


def _canonical(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise LedgerError(f"{path} can't be read: {exc.strerror}. Put it back from a backup, or mend the permissions.") from exc
