"""Where commands print: texts of users and models are shown as they are."""

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from easyedit_rls.errors import RLSEditWarning


def plain_console() -> Console:
    """A console to which brackets are brackets, not markup."""
    return Console(markup=False)


def visible(text: str) -> str:
    r"""A text on one line, with control characters written out: what a terminal would obey is shown instead.

    >>> print(visible("red \x1b[31m"))
    red \x1b[31m
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Our own warnings are a line each on stderr while the block runs, without the place in the code that
    they come from.
    """

    def show(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
        if issubclass(category, RLSEditWarning):
            print(f"easyedit-rls: {visible(str(message))}", file=sys.stderr)
        else:
            usual(message, category, *rest, **options)

    with warnings.catch_warnings():
        usual, warnings.showwarning = warnings.showwarning, show
        yield
