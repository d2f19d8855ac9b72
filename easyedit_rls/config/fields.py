"""Fields of settings: what each means and allows stands beside it, and is checked from there."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import partial
from numbers import Real
from typing import Any

from easyedit_rls.errors import HyperParamsError

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
    notes |= {"help": help_text, "objective": objective}
    return field(default=default, default_factory=factory, metadata=notes)


of_objective = partial(setting, objective=True)  # a field that defines the least-squares problem


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
    return ", and ".join(_WORDS[name].format(bound) for name, bound in notes.get("bounds", {}).items())


def are_layers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(type(layer) is int for layer in value)


def are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)


def are_statements(value: Any) -> bool:
    return are_texts(value) and all(text.count("{}") == 1 and not text.endswith("{}") for text in value)


def is_folder(value: Any) -> bool:
    """Whether it names a folder; "None" is what Python's word for it becomes in YAML, whose own is null."""
    return value is None or (isinstance(value, str) and value.strip().lower() not in ("", "none", "null"))


def has_slot(value: Any) -> bool:
    return isinstance(value, str) and value.count("{}") == 1
