"""How a function becomes a command: hydra reads its settings, our own errors end it with one line."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from easyedit_rls.errors import RLSEditError


def output_folder(config: DictConfig) -> Path:
    """Where a command writes: its `out`; in a multirun (`--multirun`) each job has a folder of its own number in there."""
    hydra_config = HydraConfig.get()
    return Path(config.out) / str(hydra_config.job.num) if hydra_config.mode == RunMode.MULTIRUN else Path(config.out)


def command(config_name: str, package: str = "easyedit_rls.conf") -> Callable[[Callable[[DictConfig], None]], Callable[[], Any]]:
    """Decorator: run the function with the config of this name, with overrides from the command line.

    Args:
        config_name: a file of the package, without its '.yaml'.
        package: where it is.
    """

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], Any]:
        @functools.wraps(function)
        def guarded(config: DictConfig) -> None:
            try:
                function(config)
            except RLSEditError as exc:
                sys.exit(f"easyedit-rls: {exc}")

        main: Callable[[], Any] = hydra.main(version_base="1.3", config_path=f"pkg://{package}", config_name=config_name)(guarded)
        return main

    return decorate
