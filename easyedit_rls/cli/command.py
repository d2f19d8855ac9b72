"""How a function becomes a command: hydra reads its settings, our own errors end it with one line."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig

from easyedit_rls.errors import RLSEditError


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
