"""Edited weights behind a gate, as the rest of the package sees them."""

from collections.abc import Sequence

from torch import Tensor

from easyedit_rls.model.gate import Decision, gate_of, gate_weight_name, has_gate
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.weights import EditedWeight


class GatedWeight(EditedWeight):
    """An edited weight that stands beside the model's own. It is read and written as one.

    Args:
        module: the projection; it has a gate.
        name: full name of the module in the model.
    """

    @property
    def live_name(self) -> str:
        """Full name of the gate's parameter."""
        return gate_weight_name(self.parameter_name)

    @property
    def parameter(self) -> Tensor:
        """W_t, in the module's own orientation."""
        return gate_of(self.module).weight

    def hold_full(self, weights: Sequence[Tensor]) -> None:
        """Keep the weights of full shards in front of the newest's, each (d_k, d_v)."""
        gate_of(self.module).full = [W.T if self._is_transposed else W for W in weights]


def find_decision(layout: Layout) -> Decision | None:
    """The decision of a model's gates; None where its edits are in its weights."""
    module = layout.edited[min(layout.edited)].module
    return gate_of(module).decision if has_gate(module) else None
