"""Settings from YAML files and mappings, each of its type, and back to a file."""

import difflib
import io
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from easyedit_rls._base.files import read_text
from easyedit_rls.config.files import shipped
from easyedit_rls.errors import HyperParamsError

_SHIELD = "\ue000{"  # stands for "${" where OmegaConf reads, which would take it for something to look up


def read_yaml(path: Path) -> Any:
    """What a settings file holds, as plain values: ``${`` in it is text, and nothing of the environment comes
    in.

    Raises:
        HyperParamsError: it can't be read, or is not YAML.
    """
    try:
        loaded = OmegaConf.load(io.StringIO(read_text(path, HyperParamsError).replace("${", _SHIELD)))
    except (yaml.YAMLError, RecursionError) as exc:
        raise HyperParamsError(f"{path} is not YAML: {' '.join(str(exc).split())}. Mend the file.") from exc
    except OSError as exc:  # OmegaConf's own, where the file holds no mapping and no list
        raise no_mapping(path) from exc
    return _replaced(OmegaConf.to_container(loaded), _SHIELD, "${") if OmegaConf.is_config(loaded) else loaded


def no_mapping(path: Path) -> HyperParamsError:
    """The error of a file that holds something else."""
    return HyperParamsError(f"{path} holds no mapping of settings. Write one 'key: value' a line.")


def typed(cls: type, settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The values of all fields of a dataclass of settings.

    Args:
        cls: the dataclass.
        settings: values by name; YAML's bare ``off``, which is False, stands for the word where that is a
            choice.
        source: where they come from, for messages.

    Raises:
        HyperParamsError: a key is unknown or missing, or a value of another type.
    """
    known = {one.name: one for one in fields(cls)}
    if unknown := [key for key in settings if key not in known]:
        shown = ", ".join(_did_you_mean(str(key), list(known)) for key in unknown)
        raise HyperParamsError(f"Unknown setting in {source}: {shown}.")
    required = {name for name, one in known.items() if one.default is one.default_factory is MISSING}
    if missing := sorted(required - settings.keys()):
        example = f"Start from a shipped file, e.g. {shipped()[0]}."
        raise HyperParamsError(f"Missing in {source}: {', '.join(missing)}. {example}")
    off = {name: "off" for name, value in settings.items() if value is False and _may_be_off(known[name])}
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), _replaced({**settings, **off}, "${", _SHIELD))
        values: dict[str, Any] = _replaced(OmegaConf.to_container(merged), _SHIELD, "${")
    except OmegaConfBaseException as exc:
        said = str(exc).splitlines()[0]
        raise HyperParamsError(f"In {source}, {exc.full_key or 'a setting'}: {said}.") from exc
    return values


def yaml_of(settings: Any) -> str:
    """A settings file, a line a setting, with what it means above."""
    lines = []
    for one in fields(settings):
        value = yaml.safe_dump(getattr(settings, one.name), default_flow_style=True, width=10**6)
        lines += textwrap.wrap(one.metadata["help"], 118, initial_indent="# ", subsequent_indent="# ")
        lines.append(f"{one.name}: {value.removesuffix(chr(10)).removesuffix(chr(10) + '...')}")
    return "\n".join(lines) + "\n"


def _may_be_off(one: "Field[Any]") -> bool:
    return "off" in (one.metadata.get("word"), *(one.metadata.get("choices") or ()))


def _did_you_mean(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"'{key}' (did you mean '{close[0]}'?)" if close else f"'{key}'"


def _replaced(values: Any, old: str, new: str) -> Any:
    """Plain values with a text replaced in all their texts."""
    if isinstance(values, str):
        return values.replace(old, new)
    if isinstance(values, Mapping):
        return {key: _replaced(value, old, new) for key, value in values.items()}
    return [_replaced(value, old, new) for value in values] if isinstance(values, (list, tuple)) else values
