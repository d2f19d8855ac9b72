"""One way to draw shares as a heat map."""

from collections.abc import Sequence
from typing import Any


def draw_heat_map(axes: Any, grid: Sequence[Sequence[float]], *, numbers: bool = True, **font: Any) -> Any:
    """Draw a grid of shares, 0 to 1, each with its number; NaN stays blank.

    Args:
        axes: matplotlib's, to draw into.
        grid: a list of values a row.
        numbers: whether to write them.
        font: of the numbers, as matplotlib's `text` takes it.

    Returns:
        The image, for a color bar.
    """
    for y, row in enumerate(grid if numbers else ()):
        for x, value in enumerate(row):
            if value == value:
                color = "black" if value > 0.5 else "white"
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=color, **font)
    return axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
