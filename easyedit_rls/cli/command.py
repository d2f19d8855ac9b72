"""How a function becomes a command: hydra reads its settings, our own errors end it with one line."""

import contextlib
import functools
import importlib.resources
import io
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from easyedit_rls._base.files import user_path
from easyedit_rls.cli.console import plain_warnings
from easyedit_rls.cli.loading import failed
from easyedit_rls.cli.schema import checked
from easyedit_rls.errors import RLSEditError


def output_folder(config: DictConfig) -> Path:
    """Where a command writes: its `out`; in a multirun (`--multirun`) each job has a folder of its own number
    in there.
    """
    hydra_config = HydraConfig.get()
    return (
        user_path(config.out) / str(hydra_config.job.num)
        if hydra_config.mode == RunMode.MULTIRUN
        else user_path(config.out)
    )


def command(
    config_name: str,
    package: str = "easyedit_rls.conf",
    words: Mapping[str, Callable[[], str]] = MappingProxyType({}),
) -> Callable[[Callable[[DictConfig], None]], Callable[[], Any]]:
    """Decorator: run the function with the config of this name, with overrides from the command line.

    Args:
        config_name: a file of the package, without its '.yaml'.
        package: where it is.
        words: of ``--help``, and what stands in their place when it is shown.
    """

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], Any]:
        @functools.wraps(function)
        def guarded(config: DictConfig) -> None:
            try:
                with plain_warnings():
                    function(checked(config, config_name))
            except RLSEditError as exc:
                sys.exit(failed(exc))

        main: Callable[[], Any] = hydra.main(
            version_base="1.3", config_path=f"pkg://{package}", config_name=config_name
        )(guarded)

        @functools.wraps(function)
        def run() -> Any:
            if "--help" not in sys.argv:
                return main()
            shown = io.StringIO()
            try:
                with contextlib.redirect_stdout(shown):
                    return main()  # hydra shows its help and exits
            finally:
                text = annotated(shown.getvalue(), _comments(package, config_name))
                for word, meaning in words.items():
                    text = text.replace(word, meaning())
                print(text, end="")

        return run

    return decorate


def annotated(text: str, comments: Mapping[str, str]) -> str:
    """Put each setting's comment behind it, which hydra leaves out when it shows a config.

    >>> print(annotated("data:\\n  first: 0\\nout: here\\n",
    ...                 {"data.first": "first record", "first": "no", "out": "folder"}), end="")
    data:
      first: 0  # first record
    out: here  # folder
    """
    lines, section = [], ""
    for line in text.splitlines():
        found = re.match(r"( {0,2})(\w+):", line)
        if found and not found[1]:
            section = found[2]
        comment = comments.get(f"{section}.{found[2]}" if found[1] else found[2]) if found else None
        lines.append(f"{line}  # {comment}\n" if comment else f"{line}\n")
    return "".join(lines)


def _comments(package: str, config_name: str) -> dict[str, str]:
    """Setting -> what its file says of it; those of groups by group and name."""
    folder = importlib.resources.files(package)
    files = [("", folder / f"{config_name}.yaml")]
    files += [
        (f"{group.name}.", file) for group in folder.iterdir() if group.is_dir() for file in group.iterdir()
    ]
    found: dict[str, str] = {}
    for prefix, file in files:
        if file.name.endswith(".yaml"):
            for name, comment in re.findall(
                r"^(\w+):.*?\s# (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE
            ):
                found.setdefault(prefix + name, comment)
    return found
