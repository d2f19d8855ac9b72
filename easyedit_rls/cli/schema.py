"""What the settings of commands are: their types and ranges, checked before any work."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from easyedit_rls._base.files import user_path
from easyedit_rls.compare.plan import VARIANT, method_of
from easyedit_rls.editors.base import EDITORS
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.evaluation.relations import most_questions
from easyedit_rls.solvers.rule import find_rule


@dataclass
class DataConfig:
    file: str | None = None
    first: int = 0
    joint: str | None = None
    count: int | None = None
    batch: int = 20
    on_bad: str = "error"


@dataclass
class ModelConfig:
    path: str = ""
    hparams: str | None = None
    trust_remote_code: bool = False


@dataclass
class EvalConfig:
    every: int = 2
    sample: int | None = None
    text: str | None = None
    answers: bool = True
    fluency: int = 0
    relations: int = 0
    tasks: list[str] = field(default_factory=list)
    tasks_every: int | None = None
    tasks_limit: int | None = None
    tasks_folder: str | None = None
    tasks_data: str | None = None


@dataclass
class EditConfig:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    device: str | None = None
    state_dir: str | None = None
    save: bool = True
    out: str = ""


@dataclass
class CompareConfig:
    alg_name: list[str] | None = None
    solver: list[str] = field(default_factory=list)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    settings: dict[str, Any] = field(default_factory=dict)
    templates: int | None = None
    chat_template: bool | None = None
    device: str | None = None
    dtype: str = "float32"
    threads: int | None = None
    jobs: int = 1
    out: str = ""


@dataclass
class DemoConfig:
    model: str = ""
    hparams: str | None = None
    trust_remote_code: bool = False
    facts: str | None = None
    text: str | None = None
    batches: int = 4
    completions: int = 6
    out: str = ""


@dataclass
class DemoModelConfig:
    out: str = ""


SCHEMAS: dict[str, type] = {
    "edit": EditConfig,
    "compare": CompareConfig,
    "demo": DemoConfig,
    "demo_model": DemoModelConfig,
}
_LEAST = {
    "data.first": 0,
    "data.count": 1,
    "data.batch": 1,
    "eval.every": 1,
    "eval.sample": 1,
    "eval.fluency": 0,
    "eval.relations": 0,
    "eval.tasks_every": 1,
    "eval.tasks_limit": 1,
    "templates": 0,
    "threads": 1,
    "jobs": 1,
    "batches": 1,
    "completions": 0,
}
_MOST = {"eval.relations": most_questions}


def checked(config: DictConfig, name: str) -> DictConfig:
    """A command's settings, each of its type and within its range.

    Args:
        config: as hydra composed it.
        name: of the command, one of `SCHEMAS`.

    Raises:
        HyperParamsError: one is of another type, or out of range; names it, the value, and what is allowed.
        InputError: nothing can be written where it names a folder to write to.
    """
    try:
        typed = OmegaConf.merge(OmegaConf.structured(SCHEMAS[name]), config)
    except OmegaConfBaseException as exc:
        said = str(exc).splitlines()[0].rstrip(".")
        raise HyperParamsError(
            f"{exc.full_key or 'A setting'}: {said}. `--help` lists what is allowed."
        ) from exc
    assert isinstance(typed, DictConfig)
    for key, least in _LEAST.items():
        value = OmegaConf.select(typed, key)
        if value is not None and value < least:
            raise HyperParamsError(f"{key} is {value}; allowed: whole numbers from {least} on.")
    for key, most in _MOST.items():
        value = OmegaConf.select(typed, key)
        if value is not None and value > most():
            raise HyperParamsError(
                f"{key} is {value}; allowed: whole numbers from {_LEAST[key]} to {most()}."
            )
    for key in ("out", "state_dir"):
        if isinstance(folder := OmegaConf.select(typed, key), str):
            check_folder(folder, key)
    return typed


def check_folder(folder: str | Path, name: str) -> None:
    """See that a folder can be made, or is there.

    Args:
        folder: where something is to be written.
        name: of the setting, for messages.

    Raises:
        HyperParamsError: it, or something above it, is a file; or it has no name.
    """
    if not str(folder).strip():
        raise HyperParamsError(f"{name} is empty. Give the name of a folder.")
    path = user_path(folder).absolute()
    there = next((place for place in (path, *path.parents) if place.exists()), path)
    if there.exists() and not there.is_dir():
        raise HyperParamsError(f"{name} is {folder}, but {there} is a file. Give the name of a folder.")


def refuse_unknown_editor(name: str) -> None:
    """See that there is an editor of a contender's name, up to the two hyphens that mark a variant.

    Raises:
        HyperParamsError: there is none; says which name may be meant.
    """
    try:
        EDITORS.get(method_of(name))
    except HyperParamsError as exc:
        known = (editor for editor in EDITORS.names() if method_of(name).startswith(f"{editor}-"))
        meant = next((f"{editor}{VARIANT}{name.removeprefix(f'{editor}-')}" for editor in known), None)
        if meant is None:
            raise
        raise HyperParamsError(f"{exc} Two hyphens mark a variant of your own: {meant}.") from exc


def check_settings(settings: Mapping[str, Any], contenders: Collection[str]) -> None:
    """See that settings are mappings by the name of an editor, a solver or a contender.

    Args:
        settings: of `compare`.
        contenders: names of all that run, which are known to be somebody's.

    Raises:
        HyperParamsError: they are not.
    """
    for name, changes in settings.items():
        if name not in {*contenders, *map(method_of, contenders)}:
            if name != method_of(name):
                raise HyperParamsError(
                    f"settings.{name} is for a contender that does not run. Name it in alg_name or solver."
                )
            if not _is_solver(name):
                refuse_unknown_editor(name)
        if not isinstance(changes, Mapping):
            raise HyperParamsError(
                f"settings.{name} is {changes!r}, not settings by name. Write settings.{name}.v_lr=0.5."
            )


def _is_solver(name: str) -> bool:
    try:
        find_rule(name)
    except HyperParamsError:
        return False
    return True
