"""One event of a ledger, as it stands in the index."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from easyedit_rls._base.clock import utc_now
from easyedit_rls._base.files import Stamp
from easyedit_rls.ledger.files import canonical, is_file_name

_KINDS = ("begin", "entry", "rollback", "checkpoint", "shard", "reset")


@dataclass(frozen=True)
class Line:
    """One event.

    Attributes:
        kind: 'begin', 'entry', 'rollback', 'checkpoint', 'shard' (a new one begins) or 'reset'.
        files: name -> stamp of the files it brought.
        record: where its tensors are in `ENTRIES`: offset and stamp; None if there are none, or they are in a
            file.
        entry: for 'entry', what `Entry.to_dict` gave; for 'begin', what the history begins with; else empty.
        time: ISO 8601, UTC.
    """

    kind: str
    files: Mapping[str, Stamp] = field(default_factory=dict)
    record: tuple[int, Stamp] | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)
    time: str = field(default_factory=utc_now)

    def encode(self) -> bytes:
        """The line as bytes."""
        files = {name: [stamp.sha256, stamp.n_bytes] for name, stamp in self.files.items()}
        values: dict[str, Any] = {"kind": self.kind, "time": self.time, "files": files, "entry": self.entry}
        if self.record is not None:
            values["record"] = [self.record[0], self.record[1].sha256, self.record[1].n_bytes]
        return canonical(values)

    @classmethod
    def decode(cls, raw: bytes) -> "Line":
        """The line that `encode` gave.

        Raises:
            ValueError: it is no such line.
        """
        values = json.loads(raw)
        files = {name: stamp_of(sha256, n_bytes) for name, (sha256, n_bytes) in values["files"].items()}
        foreign = [name for name in files if not is_file_name(name)]
        if foreign or values["kind"] not in _KINDS:
            raise ValueError(f"{(foreign or [values['kind']])[0]!r} has no place in a ledger")
        record = None
        if "record" in values:
            offset, sha256, n_bytes = values["record"]
            record = (size_of(offset), stamp_of(sha256, n_bytes))
        return cls(values["kind"], files, record, values["entry"], str(values["time"]))


def stamp_of(sha256: object, n_bytes: object) -> Stamp:
    """A checksum and a size as they stand in JSON.

    Raises:
        ValueError: they are no such things.
    """
    if not isinstance(sha256, str):
        raise ValueError("a checksum is no text")
    return Stamp(sha256, size_of(n_bytes))


def size_of(value: object) -> int:
    """A number of bytes as it stands in JSON.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 60:
        raise ValueError("a size is no number")
    return value
