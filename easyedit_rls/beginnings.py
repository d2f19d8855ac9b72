"""What rows of tokens or words begin with together."""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any


def n_shared(rows: Iterable[Sequence[Any]]) -> int:
    """How many items all rows begin with.

    >>> n_shared([(1, 2, 3), (1, 2), (1, 2, 4)])
    2
    """
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*rows)))
