"""The ledger's files: known by their names, sizes and SHA-256, tensors as safetensors.

A ledger may come from anybody. So a name in it is taken for a file only if it has one of the forms below,
which lead nowhere else; links are never followed; and nothing is read that is no regular file of the size
that was stated.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from easyedit_rls._base.files import NO_FOLLOW, Stamp
from easyedit_rls.errors import LedgerError, NumericalError, RequestError, RLSEditError

T = TypeVar("T")

CURE = "Put it back from a backup; `easyedit-rls state verify` lists all damage."
MOST_SMALL = 1 << 16  # bytes of a head or a pointer, at most
MOST_TEXT = 1 << 26  # of a manifest, or of a record's header

_JOURNAL = re.compile(r"journal-(\d{4,9})")
_FILE = re.compile(
    r"manifest\.json|(unedited|prior)-layer-\d{1,5}\.safetensors|entry-\d{6,9}\.safetensors|(checkpoint|shard)-\d{6,9}-layer-\d{1,5}\.safetensors"
)
_CHUNK = 1 << 20


def journal_number(name: str) -> int | None:
    """Number of a journal's folder; None if that is no such folder's name.

    >>> journal_number("journal-10000"), journal_number("../journal-0001")
    (10000, None)
    """
    found = _JOURNAL.fullmatch(name)
    return int(found[1]) if found else None


def is_file_name(name: object) -> bool:
    """Whether a file in a journal may be called that.

    >>> is_file_name("prior-layer-3.safetensors"), is_file_name("/etc/passwd"), \
        is_file_name("entry-000001.safetensors\\n")
    (True, False, False)
    """
    return isinstance(name, str) and _FILE.fullmatch(name) is not None


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A handle of a regular file, never of what a link leads to. What isn't there is made if the flags say
    so.

    Raises:
        LedgerError: it is a link, a folder, a pipe or a device.
        OSError: it is missing or can't be opened.
    """
    if path.is_symlink():
        raise LedgerError(
            f"{path} is a link. The files of a ledger must be its own: put the file itself there."
        )
    handle = os.open(
        path, flags | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0), 0o644
    )
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise LedgerError(f"{path} is no regular file. {CURE}")
    return handle


def read_small(path: Path) -> bytes:
    """The content of a file that is small.

    Raises:
        LedgerError: it is missing, unreadable, not a regular file, or too large.
    """
    with _reading(path) as handle:
        n_bytes = os.fstat(handle.fileno()).st_size
        if n_bytes > MOST_SMALL:
            raise LedgerError(f"{path} is damaged: it has {n_bytes} bytes. {CURE}")
        content: bytes = handle.read(MOST_SMALL)
        return content


def read_part(path: Path, offset: int, stamp: Stamp, *, holds_tensors: bool = True) -> bytes:
    """A part of a file that is what its stamp says.

    Whoever made the ledger made the stamp too. So it takes no memory before the checksum is right, and no
    time before the header of the tensors is.

    Raises:
        LedgerError: it is missing, unreadable, not a regular file, or damaged; names the file.
    """
    with _reading(path) as handle:
        n_bytes = os.fstat(handle.fileno()).st_size
        if n_bytes < offset + stamp.n_bytes:
            raise LedgerError(
                f"{path} is damaged: it has {n_bytes} bytes instead of {offset + stamp.n_bytes}. {CURE}"
            )
        if not _is_plausible(handle, offset, stamp.n_bytes) if holds_tensors else stamp.n_bytes > MOST_TEXT:
            raise LedgerError(f"{path} is damaged: it does not hold what it should. {CURE}")
        handle.seek(offset)
        digest, left = hashlib.sha256(), stamp.n_bytes
        while left and (chunk := handle.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
        if digest.hexdigest() != stamp.sha256:
            raise LedgerError(f"{path} is damaged: its SHA-256 is not the one in the index. {CURE}")
        handle.seek(offset)
        content: bytes = handle.read(stamp.n_bytes)
        return content


def _is_plausible(handle: IO[bytes], offset: int, n_bytes: int) -> bool:
    """Whether a safetensors file of that size begins there: the size of its header, then the header with the
    extent of each tensor.
    """
    handle.seek(offset)
    n_header = int.from_bytes(handle.read(8), "little")
    if not 2 <= n_header <= min(n_bytes - 8, MOST_TEXT):
        return False
    try:
        header = json.loads(handle.read(n_header))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        return 8 + n_header + max(ends, default=0) == n_bytes
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return False


def read_file(path: Path, stamp: Stamp) -> bytes:
    """The content of a file that is what its stamp says.

    Raises:
        LedgerError: see `read_part`.
    """
    with _reading(path) as handle:
        n_bytes = os.fstat(handle.fileno()).st_size
    if n_bytes != stamp.n_bytes:
        raise LedgerError(f"{path} is damaged: it has {n_bytes} bytes instead of {stamp.n_bytes}. {CURE}")
    return read_part(path, 0, stamp, holds_tensors=path.suffix == ".safetensors")


@contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    """A file to read from; whatever goes wrong is told of it."""
    try:
        with open(open_regular(path), "rb") as handle:
            yield handle
    except FileNotFoundError as exc:
        raise LedgerError(f"{path} is missing. {CURE}") from exc
    except LedgerError:
        raise
    except OSError as exc:
        raise LedgerError(f"{path} can't be read: {exc.strerror}. Mend the disk or the permissions.") from exc


def parsed(path: Path, read: Callable[[], T]) -> T:
    """What a function makes of a ledger's texts and tensors, whatever somebody put there.

    Raises:
        LedgerError: it can't be made; names the file or folder.
    """
    try:
        return read()
    except torch.OutOfMemoryError:
        raise
    except RequestError as exc:
        raise LedgerError(f"{path} is damaged: {exc.problem} {CURE}") from exc
    except NumericalError as exc:
        raise LedgerError(f"{path} can't be followed: {exc}") from exc
    except RLSEditError:
        raise
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RecursionError,
        OverflowError,
        RuntimeError,
    ) as exc:
        what = f"{type(exc).__name__}: {' '.join(str(exc).split())[:80]}"
        raise LedgerError(
            f"{path} is damaged, or holds what does not belong together ({what}). {CURE}"
        ) from exc


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    content: bytes = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata)
    )
    return content


def unpack(path: Path, content: bytes, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors of a safetensors file, in memory of their own (aligned as torch aligns, so that products come
    out bit for bit).
    """
    try:
        return {name: tensor.to(device, copy=True) for name, tensor in load(content).items()}
    except (SafetensorError, ValueError, KeyError) as exc:
        raise LedgerError(f"{path} is no safetensors file: {exc}. {CURE}") from exc


def canonical(values: Mapping[str, Any]) -> bytes:
    """A mapping as one line of JSON, always the same bytes."""
    return (
        json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass") + b"\n"
    )
