"""Where settings files are: those that come with the package, by name, and the user's own, by path."""

import contextlib
import re
from pathlib import Path

from easyedit_rls._base.files import user_path
from easyedit_rls.errors import HyperParamsError

_PACKAGED = Path(__file__).parents[1] / "_hparams"  # in an installed wheel
_CHECKOUT = Path(__file__).parents[2] / "hparams"  # in a source tree


def shipped(method: str = "RLSEdit") -> list[str]:
    """Names that the `from_hparams` of a method's settings finds without a path."""
    return sorted(path.stem for path in _shipped_folder(method).glob("*.yaml"))


def _shipped_folder(method: str) -> Path:
    return (_PACKAGED if _PACKAGED.is_dir() else _CHECKOUT) / method


def find_settings(path_or_name: str | Path, method: str = "RLSEdit") -> Path:
    """The file that is meant, by path, with or without its '.yaml', or by shipped name.

    Raises:
        HyperParamsError: there is none.
    """
    given = user_path(path_or_name)
    candidates = [given, given.parent / f"{given.name}.yaml"]
    if given.name == str(given):
        candidates.append(_shipped_folder(method) / f"{re.sub(r'[.]yaml$', '', given.name)}.yaml")
    with contextlib.suppress(OSError):  # a name too long for any file
        for candidate in candidates:
            if candidate.is_file():
                return candidate.resolve()
    raise HyperParamsError(
        f"No settings file at {given.absolute()}; shipped: {', '.join(shipped(method))}. "
        "Give a path or one of these names."
    )
