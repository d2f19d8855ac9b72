"""Files of raw records: a JSON list, JSON lines, or a CSV table."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_rls._base.files import read_text
from easyedit_rls.errors import DataError

_LINES = (".jsonl", ".ndjson")
_SETTINGS = ("joint", "importance", "case_id")  # columns whose empty cells say nothing


@dataclass(frozen=True)
class RawRecord:
    """One record as its file has it.

    Attributes:
        where: its line, where a file has one record a line; else empty.
        content: what was read; None where that failed.
        problem: why it failed.
    """

    where: str
    content: Any
    problem: str | None = None


def raw_records(path: Path) -> list[RawRecord]:
    """All records of a file. What is wrong with one line of many is that record's problem, not the file's.

    Args:
        path: its ending tells the form: '.jsonl' and '.ndjson' have a record a line, '.csv' is a table, all
            else is a JSON list.

    Raises:
        DataError: the file is missing, not UTF-8, no JSON, or no list.
    """
    text = read_text(path, DataError)
    if path.suffix.lower() in _LINES:
        return [_line(line, f"line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".csv":
        return list(_rows(text, path))
    try:
        found = _json(text)
    except ValueError as exc:
        hint = " One record a line goes into a file whose name ends in '.jsonl'." if _is_lines(text) else ""
        raise DataError(f"{path} is no JSON: {exc}.{hint}") from exc
    if not isinstance(found, list):
        raise DataError(
            f"{path} holds a {type(found).__name__}, not a list of records. "
            "(Files with a record a line end in '.jsonl'.)"
        )
    return [RawRecord("", item) for item in found]


def _line(line: str, where: str) -> RawRecord:
    try:
        return RawRecord(where, _json(line))
    except ValueError as exc:
        return RawRecord(where, None, f"is no JSON: {exc}.")


def _json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none; so is a number of thousands of digits, and nesting without end.
    """
    try:
        return json.loads(text, object_pairs_hook=_once_each)
    except RecursionError as exc:
        raise ValueError("nested too deep") from exc


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping whose keys stand in it once each; of two, JSON's own reader would take the last without a
    word.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} stands twice in one mapping")
    return found


def _is_lines(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) > 1 and all(_line(line, "").problem is None for line in lines[:2])


def _columns(names: list[str], path: Path) -> list[str]:
    """The names of a table's columns, each once."""
    columns = [name.strip() for name in names]
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise DataError(f"{path} has two columns of the name {twice[0]!r}. Give each its own.")
    other = next((mark for mark in ";\t|" if len(columns) == 1 and mark in columns[0]), None)
    if other is not None:
        raise DataError(f"{path} has {other!r} between its columns. Save it with commas.")
    return columns


def _rows(text: str, path: Path) -> Iterator[RawRecord]:
    """A table's rows by the names of its columns. An empty cell is an empty text; of `_SETTINGS`, it says
    nothing.
    """
    reader = csv.DictReader(io.StringIO(text.lstrip("\n"), newline=""), strict=True)
    try:
        reader.fieldnames = _columns(list(reader.fieldnames or ()), path)
        for row in reader:
            cells = {name: cell for name, cell in row.items() if name and (cell or name not in _SETTINGS)}
            surplus = row.get(None)
            problem = f"has {len(surplus)} cells more than the table has columns." if surplus else None
            yield RawRecord(f"line {reader.line_num}", cells, problem)
    except csv.Error as exc:
        raise DataError(f"{path}, line {reader.line_num}, is no CSV: {exc}.") from exc
