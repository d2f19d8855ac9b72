"""Files that are whole or not there: written aside, synced, renamed; and texts that are read as UTF-8 or
refused.
"""

import codecs
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from easyedit_rls.errors import InputError, TextError

PARTIAL = ".partial"  # suffix of a file that is being written
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)  # Windows has no such flag, and links there need rights of their own
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Stamp:
    """What a file must be: SHA-256 as 64 hex digits, and its size."""

    sha256: str
    n_bytes: int


def write_file(path: Path, content: bytes) -> Stamp:
    """Write a file durably: its content is on disk, under its name, when this returns; before that, the name
    is untouched.

    Whatever has the partial file's name is removed first, so that no link is followed.

    Raises:
        OSError: nothing was changed, but for a partial file that may be left where it can't be removed.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        partial.unlink(missing_ok=True)
        handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW, 0o644)
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


def make_folder(folder: Path) -> None:
    """Make a folder and those above it durably: each new name is on disk when this returns."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in a folder durable (where the system lets folders be opened)."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def user_path(name: str | Path) -> Path:
    """A path as a user writes it: ``~`` is the home folder.

    Raises:
        InputError: it begins with the name of a user who has none.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as exc:
        raise InputError(
            f"{name} begins with ~, but there is no such home folder. Write the path out, or as ./{name}."
        ) from exc


def read_text(path: str | Path, error: type[InputError] = TextError, cure: str = "Check the path.") -> str:
    """The text of a UTF-8 file, without the byte-order mark that some editors put in front.

    Args:
        path: the file.
        error: what is raised; its only argument is the message.
        cure: what to do where the file can't be read or is empty, a sentence.

    Raises:
        InputError: of the type `error`: the file is missing, a folder, unreadable, empty, or not UTF-8.
    """
    where = user_path(path).absolute()
    try:
        content = where.read_bytes()
    except IsADirectoryError as exc:
        raise error(f"{where} is a folder, not a file. {cure}") from exc
    except (OSError, ValueError) as exc:  # the latter: a name with a zero byte
        raise error(f"{where} can't be read: {getattr(exc, 'strerror', None) or exc}. {cure}") from exc
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as exc:
        at = exc.start + (len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0)
        raise error(
            f"{where} is not UTF-8 text: byte {at} is 0x{content[at]:02x}. Save it as UTF-8."
        ) from exc
    if not text.strip():
        raise error(f"{where} has no text: it is empty. {cure}")
    return text.replace("\r\n", "\n").replace("\r", "\n")
