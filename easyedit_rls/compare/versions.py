"""What a contender ran with, for results.json."""

import sys
from pathlib import Path

import torch
import transformers

import easyedit_rls


def versions(needs_host: bool) -> dict[str, str | None]:
    """Versions of the package, torch, transformers and Python.

    Args:
        needs_host: whether EasyEdit's code ran; then 'easyedit' is its checkout's commit, None where it is
            unknown.
    """
    found: dict[str, str | None] = {
        "easyedit_rls": easyedit_rls.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
    if needs_host:
        host = getattr(sys.modules.get("easyeditor"), "__file__", None)
        found["easyedit"] = None if host is None else commit_of(Path(host).parents[1])
    return found


def commit_of(checkout: Path) -> str | None:
    """The commit that a checkout is at, read off its .git; None where there is none, or it can't be told."""
    git = checkout / ".git"
    try:
        if git.is_file():  # of a work tree, or of a submodule: it says where the folder is
            git = checkout / _text(git).removeprefix("gitdir:").strip()
        head = _text(git / "HEAD")
        if not head.startswith("ref:"):
            return head
        ref = head.removeprefix("ref:").strip()
        common = git / _text(git / "commondir") if (git / "commondir").is_file() else git
        if (common / ref).is_file():
            return _text(common / ref)
        packed = _text(common / "packed-refs").splitlines()
    except OSError:
        return None
    return next((line.split()[0] for line in packed if line.endswith(f" {ref}")), None)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip()
