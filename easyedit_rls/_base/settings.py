"""Settings that stand with their range beside them, and are read from a mapping."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, field, fields
from typing import Any, TypeVar

from easyedit_rls.errors import HyperParamsError

S = TypeVar("S")


def setting(
    default: Any,
    help_text: str,
    *,
    above: float | None = None,
    least: float | None = None,
    most: float | None = None,
    words: Sequence[str] = (),
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: its value where none is given; its type is the setting's.
        help_text: what it is.
        above: what it must be above.
        least: what it must be at least.
        most: what it must be at most.
        words: texts that are allowed, instead of a number or as the only values.
    """
    limits = {"above": above, "least": least, "most": most, "words": tuple(words)}
    return field(default=default, metadata={"help": help_text, **limits})


def read_settings(cls: type[S], given: Mapping[str, Any], where: str) -> S:
    """Settings of a class from a mapping, each of its type and within its range.

    Args:
        cls: a dataclass whose fields were made by `setting`.
        given: name -> value.
        where: whose settings they are, for messages.

    Raises:
        HyperParamsError: one is unknown, of another type, or out of range; names it, the value, and what is
            allowed.
    """
    known = {item.name: item for item in fields(cls)}  # type: ignore[arg-type]
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            has = ", ".join(known) or "none"
            raise HyperParamsError(f"{where} has no setting {name!r}.{hint} It has: {has}.")
        if not _fits(value, known[name].default, known[name].metadata):
            allowed = _allowed(known[name].default, known[name].metadata)
            raise HyperParamsError(f"Setting {name} of {where} is {value!r}; allowed: {allowed}.")
    return cls(**given)


def _fits(value: Any, default: Any, limits: Mapping[str, Any]) -> bool:
    if isinstance(value, str):
        return value in limits["words"]
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, str) and not _ranged(limits):
        return False
    kinds = int if isinstance(default, int) else (int, float)
    if not isinstance(value, kinds) or not math.isfinite(value):
        return False
    is_low = limits["above"] is not None and value <= limits["above"]
    is_low |= limits["least"] is not None and value < limits["least"]
    return not is_low and (limits["most"] is None or value <= limits["most"])


def _ranged(limits: Mapping[str, Any]) -> bool:
    return any(limits[key] is not None for key in ("above", "least", "most"))


def _allowed(default: Any, limits: Mapping[str, Any]) -> str:
    if isinstance(default, bool):
        return "true or false"
    bounds = [f"{word} {limits[key]:g}" for key, word in _BOUNDS.items() if limits[key] is not None]
    number = "a whole number" if isinstance(default, int) else "a number"
    texts = [repr(word) for word in limits["words"]]
    if isinstance(default, str) and not _ranged(limits):
        return " or ".join(texts)
    return " or ".join([" ".join([number, " and ".join(bounds)]).strip(), *texts])


def defaults(cls: type) -> dict[str, Any]:
    """Names and default values of a class's settings."""
    return {item.name: item.default for item in fields(cls) if item.default is not MISSING}


_BOUNDS = {"above": "above", "least": "of at least", "most": "of at most"}
