"""What an editor tells of its work."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class FactReport:
    """How one fact fared.

    Attributes:
        edit_id: its number, for `RLSEditor.retract` and `amend`.
        prompt: the prompt.
        target: what the model shall say.
        case_id: the caller's own number, if any.
        steps: Adam steps its value took.
        loss: the value's loss at the end, nats.
        nll: the target's negative log-likelihood with the value put in by hand, nats a token.
        value_change: ‖z − h‖/‖h‖ before the weights were written.
        miss: ‖z − h‖ after they were written, as a fraction of the same before; 0 is a perfect write.
        is_said: whether the edited model says the target: each of its tokens is the most probable one behind
            the bare prompt.
        leverage: g of its key, where there is a gate (`memory: gated`).
        is_open: whether the gate lets its key see the edits.
    """

    edit_id: int
    prompt: str
    target: str
    case_id: int | str | None
    steps: int
    loss: float
    nll: float
    value_change: float
    miss: float
    is_said: bool
    leverage: float | None = None
    is_open: bool = True


@dataclass(frozen=True)
class LayerReport:
    """State of one edited layer after the batch.

    Attributes:
        layer: its number.
        step: ‖W_t − W_{t−1}‖/‖W_0‖.
        deviation: ‖W_t − W_0‖/‖W_0‖.
        drift: relative error of the covariance (see `RecursiveLeastSquares.drift`).
        fill: how much of the layer's memory the edits have taken, 1 − tr(C_t A_0)/d_k, an estimate
            (`solvers.fill`); None for rules without such a memory.
    """

    layer: int
    step: float
    deviation: float
    drift: float
    fill: float | None = None


@dataclass(frozen=True)
class EditReport:
    """What one call of `RLSEditor.edit` did.

    Attributes:
        batch: number of the batch, from 1.
        n_edits: edits in the state after it.
        facts: a report each request, in order, and behind them one for each edit that was rehearsed.
        layers: a report each edited layer.
        superseded: numbers of older edits that were taken out because these contradict them.
        rehearsed: numbers of older edits that the model had lost, which were taken out and edited in again.
        seconds: time in 'rehearsal' (looking for these), 'prepare' (templates, anchors; first batch only),
            'values', 'weights' (keys and updates), 'check' (which facts the model says now), and 'ledger'
            (the entry, and a checkpoint where one was due).
    """

    batch: int
    n_edits: int
    facts: list[FactReport]
    layers: list[LayerReport]
    superseded: list[int]
    rehearsed: list[int]
    seconds: dict[str, float]

    @property
    def seconds_per_edit(self) -> float:
        """Seconds a request, without the one-time preparation; what was rehearsed is paid for by the
        requests, if there were any.
        """
        return (sum(self.seconds.values()) - self.seconds["prepare"]) / (
            len(self.facts) - len(self.rehearsed) or len(self.facts)
        )

    @property
    def unsaid(self) -> list[FactReport]:
        """The facts that the model does not say, although they were edited in."""
        return [fact for fact in self.facts if not fact.is_said]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "seconds_per_edit": self.seconds_per_edit}


@dataclass(frozen=True)
class RetractReport:
    """What one call of `RLSEditor.retract` did.

    Attributes:
        retracted: numbers of the edits that were taken out.
        n_edits: edits in the state after it.
        layers: a report each edited layer.
    """

    retracted: list[int]
    n_edits: int
    layers: list[LayerReport]
