"""What settings of RLSEdit's own kinds must pass."""

from functools import partial
from typing import Any

from easyedit_rls._base.settings import setting

of_objective = partial(setting, objective=True)  # a field that defines the least-squares problem


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
