"""One way to show progress: tqdm bars that follow the terminal unless told otherwise."""

from typing import Any

from tqdm.auto import tqdm


def progress_bar(total: int | None, desc: str, unit: str, show_progress: bool | None) -> "tqdm[Any]":
    """A bar on stderr.

    Args:
        total: units of work, None where nobody knows.
        desc: label.
        unit: what is counted.
        show_progress: True or False, or None to show it on a terminal only.
    """
    return tqdm(
        total=total, desc=desc, unit=unit, disable=None if show_progress is None else not show_progress
    )
