"""What both kinds of running solution have in common: a weight, and a last change that can be taken back."""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

from torch import Tensor

from easyedit_rls.errors import StateMismatchError


class Change(Protocol):
    """A change that is not final yet.

    Attributes:
        W: the weight after it, (d_k, d_v).
        n_edits: edits in the solution after it.
    """

    @property
    def W(self) -> Tensor: ...

    @property
    def n_edits(self) -> int: ...


C = TypeVar("C", bound=Change)


class Revertible(ABC, Generic[C]):
    """A running solution whose last change is kept apart until the next one comes."""

    name: str
    _W: Tensor
    _n_edits: int
    _pending: C | None

    @property
    def weight(self) -> Tensor:
        """Current solution W_t, (d_k, d_v). Do not write to it; it is good until the change after the next."""
        return self._W if self._pending is None else self._pending.W

    @property
    def weight_before(self) -> Tensor | None:
        """What `rollback` would make of `weight`; None where nothing can be rolled back."""
        return None if self._pending is None else self._W

    @property
    def n_edits(self) -> int:
        """Edits taken in and not retracted, faded ones too."""
        return self._n_edits if self._pending is None else self._pending.n_edits

    @property
    def has_pending(self) -> bool:
        """Whether there is a change that `rollback` would take back."""
        return self._pending is not None

    @abstractmethod
    def commit(self) -> None:
        """Make the last change permanent: `rollback` can't undo it any more."""

    def rollback(self) -> None:
        """Take the last change back: everything is bit for bit as before it.

        Raises:
            StateMismatchError: there is no change, or it was taken back already.
        """
        if self._pending is None:
            raise StateMismatchError(f"No batch of {self.name} can be rolled back: only the last one can, and only once.")
        self._pending = None

    def adopt(self, W: Tensor) -> None:
        """Go on from a weight that somebody else wrote, (d_k, d_v), keeping the covariance. The last change becomes final."""
        self.commit()
        self._W = W.to(self._W, copy=True)
