"""Where commands print: texts of users and models are shown as they are."""

from rich.console import Console


def plain_console() -> Console:
    """A console to which brackets are brackets, not markup."""
    return Console(markup=False)


def visible(text: str) -> str:
    r"""A text on one line, with control characters written out: what a terminal would obey is shown instead.

    >>> print(visible("red \x1b[31m"))
    red \x1b[31m
    """
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
