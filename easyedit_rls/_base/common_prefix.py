"""What rows of tokens or words begin with together. (`os.path.commonprefix` does the same, but is for paths,
and deprecated.)
"""

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any


def common_prefix(rows: Iterable[Sequence[Any]]) -> int:
    """How many items all rows begin with.

    >>> common_prefix([(1, 2, 3), (1, 2), (1, 2, 4)])
    2
    """
    return sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*rows)))
