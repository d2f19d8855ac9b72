"""Symmetric matrices held by half: the lower triangle, in panels of rows."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from easyedit_rls.solvers.spd import symmetrize_

_ROWS = 512  # of a panel: measured best of 256 to 2048 at n = 14,336
_DEVICE_ROWS = 4096  # the same on an accelerator, where each panel costs launches
_STRIP = 64  # rows of a strip in `to_vector`


class Term:
    """``sign · G Gᵀ``, (n, n), to be added to a `PackedSymmetric`. It knows how much of the matrix has it: a
    pass may break off anywhere.

    Args:
        G: (n, u).
        sign: 1 or -1.
    """

    def __init__(self, G: Tensor, sign: float) -> None:
        self.G, self.sign = G, sign
        self._panels: list[Tensor] = []  # those that have it, the first ones
        self._is_whole = False

    @property
    def is_in(self) -> bool:
        """Whether the whole matrix has it."""
        return self._is_whole

    def is_in_panel(self, number: int) -> bool:
        """Whether a panel of the matrix has it."""
        return len(self._panels) > number

    def add_to(self, panel: Tensor, rows: slice) -> Tensor:
        """Add it to some rows of a matrix, up to the column of the last of them, in place."""
        return panel.addmm_(self.G[rows], self.G[: rows.stop].T, alpha=self.sign)

    def bring_in(self, panel: Tensor, rows: slice) -> None:
        """The same, and remember it. One call into C does both, so that no interrupt and no fault comes
        between them.
        """
        self._panels.extend(
            map(partial(panel.addmm_, alpha=self.sign), (self.G[rows],), (self.G[: rows.stop].T,))
        )

    def seal(self) -> None:
        """From here on, the whole matrix has it."""
        self._is_whole = True


class PackedSymmetric:
    """A symmetric (n, n) matrix by its lower triangle, as the covariance of the recursion is held.

    Rows are cut into panels, each a tensor of its own, (rows, columns up to the last of these rows), so that
    a pass over the matrix is a few large products on contiguous memory. Only the square at a panel's end
    holds both of its halves, and holds them exactly symmetric. On the CPU that is 52 % of the whole matrix at
    n = 14,336.

    >>> C = PackedSymmetric.from_dense(torch.eye(2))
    >>> C.update_([Term(torch.tensor([[1.0], [2.0]]), -1.0)], torch.tensor([[1.0, 1.0]]))
    tensor([[-2., -5.]])
    >>> C.to_dense()
    tensor([[ 0., -2.],
            [-2., -3.]])
    """

    def __init__(self, panels: Sequence[Tensor]) -> None:
        self.panels = tuple(panels)

    @classmethod
    def from_dense(cls, M: Tensor, dtype: torch.dtype | None = None) -> "PackedSymmetric":
        """A copy of M's lower triangle.

        Args:
            M: exactly symmetric, (n, n).
            dtype: of the copy; None for M's own.
        """
        return cls([_copy(M[rows, : rows.stop], dtype) for rows in _cuts(len(M), M.device)])

    def __len__(self) -> int:
        return self.panels[-1].shape[1] if self.panels else 0

    def clone(self) -> "PackedSymmetric":
        return PackedSymmetric([panel.clone() for panel in self.panels])

    def to_dense(self, terms: Sequence[Term] = ()) -> Tensor:
        """The whole matrix, with some terms that need not be in it yet, as a new (n, n) tensor."""
        M = self.panels[0].new_empty(len(self), len(self))
        for number, (rows, panel) in enumerate(self._rows()):
            panel = self._with(terms, number, rows, panel)
            M[rows, : rows.stop] = panel
            M[: rows.start, rows] = panel[:, : rows.start].T
        return M

    def update_(
        self,
        terms: Sequence[Term],
        X: Tensor | None = None,  # shape: (m, n)
        besides: Sequence[Term] = (),
    ) -> Tensor:
        """``C ← C + Σ sign · G Gᵀ`` in place, and ``X C`` with the new C, in one pass over the triangle.

        Each panel is read once, changed, and multiplied. No temporary is larger than a panel, and the product
        depends on C's entries and on the terms alone: bit for bit, whether a term is brought in, was before,
        in whole or in part, or is one of those `besides`. A pass that breaks off leaves nothing undone that
        the next one does not make up for.

        Args:
            terms: to be in C from now on.
            X: what to multiply with; None for nothing.
            besides: terms that count in the product, but must not be in C yet.

        Returns:
            ``X (C + Σ besides)`` for the new C, (m, n); without rows if X is None.
        """
        terms = [term for term in terms if not term.is_in]
        X = self.panels[0].new_empty(0, len(self)) if X is None else X
        out = torch.zeros_like(X, memory_format=torch.contiguous_format)
        for number, (rows, panel) in enumerate(self._rows()):
            for term in terms:
                if not term.is_in_panel(number):
                    term.bring_in(panel, rows)
                symmetrize_(panel[:, rows])
            if len(X):
                panel = self._with(besides, number, rows, panel)
                out[:, rows].addmm_(X[:, : rows.stop], panel.T)
                out[:, : rows.start].addmm_(X[:, rows], panel[:, : rows.start])
        for term in terms:
            term.seal()
        return out

    def _with(self, terms: Sequence[Term], number: int, rows: slice, panel: Tensor) -> Tensor:
        """A panel with the terms that it lacks; itself if it lacks none."""
        terms = [term for term in terms if not term.is_in]
        if not terms:
            return panel
        panel = panel.clone()
        for term in terms:
            if not term.is_in_panel(number):
                term.add_to(panel, rows)
            symmetrize_(panel[:, rows])
        return panel

    def to_vector(self, terms: Sequence[Term] = ()) -> Tensor:
        """The lower triangle in strips of 64 rows cut off behind the strip's last row, the same on every
        device.

        Args:
            terms: to be in it, if they aren't yet.

        Returns:
            A new vector of about n(n + 64)/2 entries, from which `from_vector` makes the matrix again, bit
            for bit.

        >>> PackedSymmetric.from_dense(torch.eye(2)).to_vector()
        tensor([1., 0., 0., 1.])
        """
        strips = []
        for number, (rows, panel) in enumerate(self._rows()):
            panel = self._with(terms, number, rows, panel)
            strips += [
                panel[i : i + _STRIP, : rows.start + i + _STRIP].reshape(-1)
                for i in range(0, len(panel), _STRIP)
            ]
        return torch.cat(strips)

    @classmethod
    def from_vector(cls, vector: Tensor, n: int) -> "PackedSymmetric":
        """The (n, n) matrix that `to_vector` was taken from.

        >>> PackedSymmetric.from_vector(torch.tensor([1.0, 2.0, 2.0, 5.0]), 2).to_dense()
        tensor([[1., 2.],
                [2., 5.]])
        """
        panels, start = [], 0
        for rows in _cuts(n, vector.device):
            panel = vector.new_empty(rows.stop - rows.start, rows.stop)
            for i in range(0, len(panel), _STRIP):
                strip = panel[i : i + _STRIP, : rows.start + i + _STRIP]
                strip.copy_(vector[start : start + strip.numel()].view_as(strip))
                start += strip.numel()
                panel[:i, rows.start + i : rows.start + i + _STRIP] = strip[:, rows.start : rows.start + i].T
            panels.append(panel)
        return cls(panels)

    def _rows(self) -> Iterator[tuple[slice, Tensor]]:
        """Each panel with the rows that it holds; it ends with the column of the last of them."""
        for panel in self.panels:
            yield slice(panel.shape[1] - len(panel), panel.shape[1]), panel


def _copy(M: Tensor, dtype: torch.dtype | None) -> Tensor:
    return M.to(dtype=dtype, copy=True, memory_format=torch.contiguous_format)


def _cuts(n: int, device: torch.device) -> list[slice]:
    size = _ROWS if device.type == "cpu" else _DEVICE_ROWS
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]
