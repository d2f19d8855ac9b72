"""Arguments that are taken for what they are: one text is no list of letters, and one record no list of
names.
"""

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import TypeVar

from easyedit_rls.errors import ArgumentError, HyperParamsError

T = TypeVar("T")


def texts(value: Iterable[str], name: str) -> list[str]:
    """The texts of a list, at least one; see `listed`.

    Raises:
        ArgumentError: it is one text, or none, or something in it is no text.
    """
    found = listed(value, name)
    if not found:
        raise ArgumentError(f"{name} is empty. Give at least one text.")
    for item in found:
        text(item, f"An item of {name}")
    return found


def listed(value: Iterable[T], name: str, what: str = "texts") -> list[T]:
    """The items of a list, a tuple or any other iterable.

    Args:
        value: what was given.
        name: of the argument, for the message.
        what: the items are, for the message.

    Raises:
        ArgumentError: it is one text, one mapping, or nothing that has items.
    """
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ArgumentError(
            f"{name} is a {type(value).__name__}, not a list of {what}. Put it into brackets: [{name}]."
        )
    return list(value)


def text(value: object, name: str) -> str:
    """One text.

    Raises:
        ArgumentError: it is something else.
    """
    if not isinstance(value, str):
        raise ArgumentError(
            f"{name} is a {type(value).__name__}, not a text. Give a str, such as a file's read_text()."
        )
    return value


def at_least(value: object, least: int, name: str) -> int:
    """A whole number.

    Raises:
        HyperParamsError: it is none, or below the least that is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise HyperParamsError(f"{name} is {value!r}; allowed: whole numbers from {least} on.")
    return int(value)
