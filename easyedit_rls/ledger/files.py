"""Files that are whole or not there: written aside, synced, renamed; known by their SHA-256."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from easyedit_rls.errors import LedgerError

PARTIAL = ".partial"  # suffix of a file that is being written
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Stamp:
    """What a file must be: SHA-256 as 64 hex digits, and its size."""

    sha256: str
    n_bytes: int


def write_file(path: Path, content: bytes) -> Stamp:
    """Write a file durably: its content is on disk, under its name, when this returns; before that, the name is untouched.

    Raises:
        OSError: nothing was changed, but for a partial file that may be left where it can't be removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(handle, content)
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return Stamp(hashlib.sha256(content).hexdigest(), len(content))


def write_all(handle: int, content: bytes) -> None:
    """Write all bytes to an open file."""
    view = memoryview(content)
    while view:
        view = view[os.write(handle, view[:_CHUNK]) :]


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable (where the system lets folders be opened)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_file(path: Path, stamp: Stamp) -> bytes:
    """The content of a file that is what its stamp says.

    Raises:
        LedgerError: it is missing, unreadable or damaged; names the file.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError as exc:
        raise LedgerError(f"{path} is missing. {_CURE}") from exc
    except OSError as exc:
        raise LedgerError(f"{path} can't be read: {exc.strerror}. Mend the disk or the permissions.") from exc
    if len(content) != stamp.n_bytes:
        raise LedgerError(f"{path} is damaged: it has {len(content)} bytes instead of {stamp.n_bytes}. {_CURE}")
    if hashlib.sha256(content).hexdigest() != stamp.sha256:
        raise LedgerError(f"{path} is damaged: its SHA-256 is not the one in the index. {_CURE}")
    return content


def pack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    content: bytes = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    return content


def unpack(path: Path, content: bytes, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Tensors of a safetensors file, in memory of their own (aligned as torch aligns, so that products come out bit for bit)."""
    try:
        return {name: tensor.to(device, copy=True) for name, tensor in load(content).items()}
    except SafetensorError as exc:
        raise LedgerError(f"{path} is no safetensors file: {exc}. {_CURE}") from exc


_CURE = "Put it back from a backup; `easyedit-rls state verify` lists all damage."
