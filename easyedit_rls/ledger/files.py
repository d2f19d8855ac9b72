"""The ledger's files: known by their SHA-256, tensors as safetensors."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from easyedit_rls.errors import LedgerError
from easyedit_rls.files import Stamp


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
