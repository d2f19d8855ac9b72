"""Fields of a raw request or record: each as what it should be, or a `RequestError` that names the field.

Which record it is, whoever goes through them says (`told_of`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from easyedit_rls.errors import RequestError

Chat = tuple[tuple[str, str], ...]

IMPORTANCES = (1e-6, 1e6)  # least and largest: float64 can take an edit of either back exactly
_LARGE = 2**63


@contextmanager
def told_of(index: int) -> Iterator[None]:
    """A `RequestError` in the block is one of the request, or record, at this position."""
    try:
        yield
    except RequestError as exc:
        raise exc.at(index) from exc


def importance(value: object) -> float:
    """A weight d_i within `IMPORTANCES`, as a plain number."""
    least, largest = IMPORTANCES
    if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= largest:  # type: ignore[operator]
        shown = "a very long number" if isinstance(value, int) and abs(value) > _LARGE else repr(value)
        raise RequestError(
            f"is {shown}. Give a number from {least:g} to {largest:g}; 1 is the usual weight.",
            field="importance",
        )
    return float(value)


def case_id(value: object) -> int | str | None:
    """A request's number or name, if it has one; see `EditRequest`."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, Integral) or abs(int(value)) > _LARGE:
        raise RequestError(
            f"is a {type(value).__name__}. Give a number below 2^63, or a text.", field="case_id"
        )
    return int(value)


def parse_joint(fact: Mapping[str, Any]) -> str | None:
    """What stands between a record's prompts and answers, if it says so.

    Raises:
        RequestError: it is no text.
    """
    joint = fact.get("joint")
    if joint is None or isinstance(joint, str):
        return joint
    raise RequestError(
        f"is a {type(joint).__name__}, not text. Give a space, an empty text, or leave it out.", field="joint"
    )


def parse_messages(fact: Mapping[str, Any]) -> tuple[Chat, str]:
    """Of a record with ``messages``, the turns before the user's last one, and that one's text.

    Raises:
        RequestError: it is no chat that ends in a user's turn, or there is a prompt beside it.
    """
    if fact.get("prompt") is not None:
        raise RequestError("stands beside a prompt. Give one of the two.", field="messages")
    turns = fact["messages"]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise RequestError("is no list of turns. Give {'role': …, 'content': …} for each.", field="messages")
    for number, turn in enumerate(turns):
        is_turn = (
            isinstance(turn, Mapping)
            and set(turn) == {"role", "content"}
            and all(isinstance(said, str) for said in turn.values())
        )
        if not is_turn:
            raise RequestError(
                f"has turn {number}, {turn!r}. Give {{'role': …, 'content': …}}, both texts.",
                field="messages",
            )
    if turns[-1]["role"] != "user":
        raise RequestError(
            f"ends in a turn of the {turns[-1]['role']!r}. Let the user's turn be the last.", field="messages"
        )
    for turn in turns[:-1]:
        if turn["content"]:
            check_text(turn["content"] + ".", "messages")
    if not turns[-1]["content"].strip():
        raise RequestError("ends in an empty turn. Give its text.", field="messages")
    return tuple((turn["role"], turn["content"]) for turn in turns[:-1]), turns[-1]["content"]


def text(fact: Mapping[str, Any], key: str) -> str:
    """The text of a field, which must have one."""
    value = fact.get(key)
    if isinstance(value, Mapping):  # CounterFact: {"str": ..., "id": ...}
        value = value.get("str")
    if isinstance(value, (list, tuple)) and len(value) == 1:  # some EasyEdit data sets
        value = value[0]
    if value is None:
        raise RequestError("is missing. Add it.", field=key)
    if not isinstance(value, str):
        raise RequestError(f"is a {type(value).__name__}, not text.", field=key)
    return check_text(value, key)


def texts(fact: Mapping[str, Any], key: str) -> list[str]:
    """The texts of a field: one, a list of them, or none."""
    value = fact.get(key)
    if value is None or value == "" or is_nan(value):
        return []
    return [check_text(one, key) for one in text_list(value, key)]


def text_list(value: Any, field: str, least: int = 0) -> list[str]:
    """One text, or a list of at least so many, as a list.

    Raises:
        RequestError: it is neither.
    """
    values = [value] if isinstance(value, str) else value
    is_list = isinstance(values, (list, tuple)) and len(values) >= least
    if not is_list or not all(isinstance(one, str) for one in values):
        raise RequestError("is neither a text nor a list of texts.", field=field)
    return list(values)


def check_text(given: str, field: str) -> str:
    """A text with something in it, of characters that are some.

    Raises:
        RequestError: it is empty, or holds half a character (a lone surrogate), which no tokenizer takes.
    """
    if not given.strip():
        raise RequestError("is empty. Give its text.", field=field)
    try:
        given.encode()
    except UnicodeEncodeError as exc:
        raise RequestError(
            f"holds half a character, {given[exc.start]!r}. Write the whole one.", field=field
        ) from exc
    return given


def is_nan(value: object) -> bool:
    """Whether it is what tables have in empty cells."""
    return isinstance(value, float) and value != value


def mapping(fact: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What a field maps; nothing where it is missing."""
    value = fact.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise RequestError(f"is a {type(value).__name__}, not a mapping.", field=key)
    return value
