"""Settings that stand with what they mean and allow beside them, are checked from there, and are read from a
mapping.
"""

import difflib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from numbers import Real
from typing import Any, TypeVar

from easyedit_rls.errors import HyperParamsError

S = TypeVar("S")

_TESTS = {"above": operator.gt, "least": operator.ge, "below": operator.lt, "most": operator.le}
_WORDS = {"above": "above {}", "least": "{} or above", "below": "below {}", "most": "up to {}"}


def setting(
    help_text: str,
    default: Any = MISSING,
    *,
    factory: Any = MISSING,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: Sequence[Any] | None = None,
    word: str | None = None,
    test: Callable[[Any], bool] | None = None,
    allowed: str | None = None,
    objective: bool = False,
    search: tuple[float, float] | None = None,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        help_text: what it means; a settings file says it above the value.
        default, factory: as of `dataclasses.field`; with neither, it must be given.
        above, least, below, most: bounds of a number.
        choices: all its values.
        word: a text that may stand for the number.
        test: what a value must pass; `allowed` says it in words.
        allowed: how the error says what may be given, where bounds and choices don't say it well.
        objective: whether it defines the least-squares problem.
        search: from where to where `easyedit-rls tune` looks for a number, in logarithmic steps; None leaves
            it alone.
    """
    numbers = {"above": above, "least": least, "below": below, "most": most}
    bounds = {name: bound for name, bound in numbers.items() if bound is not None}
    notes: dict[str, Any] = {
        "bounds": bounds,
        "choices": choices,
        "word": word,
        "test": test,
        "allowed": allowed,
    }
    notes |= {"help": help_text, "objective": objective, "search": search}
    return field(default=default, default_factory=factory, metadata=notes)


def check_fields(settings: Any) -> None:
    """See that every field of a dataclass of settings is within what stands beside it.

    Raises:
        HyperParamsError: one is not; names it, its value, and what is allowed.
    """
    for one in fields(settings):
        value, notes = getattr(settings, one.name), one.metadata
        is_finite = not isinstance(value, float) or math.isfinite(value)
        refuse_unless(is_finite, settings, one.name, "a finite number")
        refuse_unless(_is_allowed(value, notes), settings, one.name, notes.get("allowed") or _allowed(notes))


def read_settings(cls: type[S], given: Mapping[str, Any], where: str) -> S:
    """Settings of a dataclass from a mapping, each of its default's type and within its range.

    Args:
        cls: its fields were made by `setting`, with defaults.
        given: name -> value.
        where: whose settings they are, for messages.

    Raises:
        HyperParamsError: one is unknown, of another type, or out of range; names it and what is allowed.
    """
    known = defaults(cls)
    for name, value in given.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            has = ", ".join(known) or "none"
            raise HyperParamsError(f"The {where} has no setting {name!r}.{hint} It has: {has}.")
        if isinstance(known[name], int) and type(value) is not int:
            raise HyperParamsError(f"Setting {name} of the {where} is {value!r}; allowed: whole numbers.")
    made = cls(**given)
    try:
        check_fields(made)
    except HyperParamsError as exc:
        raise HyperParamsError(f"In the settings of the {where}: {exc}") from exc
    return made


def defaults(cls: type) -> dict[str, Any]:
    """Names and default values of a class's settings."""
    return {one.name: one.default for one in fields(cls)}


def searched(cls: type) -> dict[str, tuple[float, float]]:
    """Names of a class's settings that are searched, and from where to where."""
    return {one.name: one.metadata["search"] for one in fields(cls) if one.metadata.get("search")}


def refuse_unless(is_fine: bool, settings: Any, name: str, allowed: str) -> None:
    """Raise the error of a setting that is not fine.

    Raises:
        HyperParamsError: names it, its value, and what is allowed.
    """
    if not is_fine:
        raise HyperParamsError(f"Setting {name} is {getattr(settings, name)!r}; allowed: {allowed}.")


def _is_allowed(value: Any, notes: Mapping[str, Any]) -> bool:
    if bounds := notes.get("bounds"):
        if isinstance(value, Real) and not isinstance(value, bool):
            return all(_TESTS[name](value, bound) for name, bound in bounds.items())
        return notes["word"] is not None and bool(value == notes["word"])
    if notes.get("choices"):
        return value in notes["choices"]
    return not notes.get("test") or notes["test"](value)


def _allowed(notes: Mapping[str, Any]) -> str:
    if notes.get("choices"):
        return " or ".join(repr(choice) for choice in notes["choices"])
    bounds = ", and ".join(_WORDS[name].format(bound) for name, bound in notes.get("bounds", {}).items())
    return f"{bounds}, or {notes['word']!r}" if notes.get("word") else bounds
