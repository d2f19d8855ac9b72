"""What an editor remembers of one model, and how that memory follows the model's weights."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyedit_rls.errors import StateMismatchError
from easyedit_rls.model.weights import EditedWeight
from easyedit_rls.recursion import RecursiveLeastSquares

logger = logging.getLogger(__name__)


@dataclass
class EditorState:
    """Memory of all edits made to one model under one objective. It refers to no module, so a deep copy stands on its own.

    Attributes:
        layers: layer number -> its recursive solution; empty before the first batch.
        unedited: layer number -> W_0, (d_k, d_v), float32.
        templates: context templates of the keys and values.
        found: layer number -> the parameter as it was before the last batch; None where that batch can't be taken back.
        n_batches: batches taken in.
    """

    layers: dict[int, RecursiveLeastSquares] = field(default_factory=dict)
    unedited: dict[int, Tensor] = field(default_factory=dict)
    templates: list[str] = field(default_factory=list)
    found: dict[int, Tensor] | None = None
    n_batches: int = 0

    @property
    def n_edits(self) -> int:
        """Edits taken in."""
        return next((solution.n_edits for solution in self.layers.values()), 0)

    def clear(self) -> None:
        """Forget everything."""
        self.layers, self.unedited, self.templates, self.found, self.n_batches = {}, {}, [], None, 0

    def follow(self, edited: Mapping[int, EditedWeight]) -> None:
        """Hold the state against the weights: go on, roll back as somebody did with the weights, or refuse.

        Args:
            edited: layer number -> the model's weight.

        Raises:
            StateMismatchError: the weights are neither those that the last batch wrote nor those that it found.
        """
        changed = [layer for layer, solution in self.layers.items() if not edited[layer].holds(solution.weight)]
        if not changed:
            return
        if self.found is not None and all(torch.equal(edited[layer].parameter, found) for layer, found in self.found.items()):
            logger.info("The weights are those from before batch %d: it was rolled back, and so is the state", self.n_batches)
            self.roll_back()
            return
        raise StateMismatchError(
            f"The weights of layers {changed} are neither those that the last batch wrote nor those it found. Call reset() to start "
            "anew from them (in EasyEdit: reset_cache=True), or adopt_weights() to go on from them with the edits' covariance."
        )

    def roll_back(self) -> None:
        """Take the last batch out of the memory, bit for bit; the weights are somebody else's affair."""
        for solution in self.layers.values():
            solution.rollback()
        self.found = None
        self.n_batches -= 1
