"""A memory behind a gate (``memory: gated``): the model's own weights stay as they are, and a token sees the
edits where the covariance says that they have something to say of it (`model.gate`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.ordinary import ordinary_keys
from easyedit_rls.anchors.prior import LayerStart
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.transaction import WeightMemory
from easyedit_rls.errors import GateError, LayoutError, StateMismatchError
from easyedit_rls.ledger.history import GateEntry
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.shards import Shard
from easyedit_rls.model.gate import (
    CLOSED,
    Decision,
    gate_of,
    gated_modules,
    has_gate,
    put_gates,
    remove_gates,
)
from easyedit_rls.model.gated_weight import GatedWeight
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.weights import EditedWeight
from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.fill import Gauge
from easyedit_rls.solvers.spd import inverse_factor

_GROWTH = 1.2  # edits have to grow so much, or shrink, for the threshold to be taken anew
_BELOW = 1e-6  # a prompt's leverage, so that it is open in float32
_AT_ONCE = 4096  # ordinary keys

Beginnings = Callable[[int], LayerStart]


@dataclass
class _Full:
    """A full shard, with the factor that the gate goes by, and ‖a R‖² of the ordinary keys once they were
    asked for.
    """

    shard: Shard
    factor: Tensor
    norms: Tensor | None = None


class GatedMemory(WeightMemory):
    """Edits stand beside the model's weights, behind gates.

    Args:
        edited: layer number -> the model's weight behind its gate.
        share: of ordinary tokens that may be open, for the threshold.
        most: the same where edits' own prompts would stay shut otherwise.
        prior: how much the prior counts for the gate, as a share of what it does for the weights.
        keys: gives keys of ordinary tokens at the gate's layer, (n, d_k); None where nothing is to be edited.

    Attributes:
        gate: threshold in use, and at how many edits it was taken; None before the first edit.
    """

    def __init__(
        self,
        edited: Mapping[int, GatedWeight],
        share: float = 1e-3,
        prior: float = 0.03,
        keys: Callable[[], Tensor] | None = None,
        most: float = 1e-3,
    ) -> None:
        super().__init__(edited)
        self._gated = edited
        self._share, self._prior, self._keys, self._layer = share, prior, keys, min(edited)
        self._most = max(share, most)
        self._sample: tuple[Tensor, Tensor] | None = None  # ordinary keys a, and ‖a R_0‖²
        self._full: list[_Full] = []

    @property
    def decision(self) -> Decision:
        """Of the model's gates."""
        return gate_of(self._edited[self._layer].module).decision

    def refuse_unknown(self) -> None:
        """See that the gate is closed: nobody knows of edits behind it.

        Raises:
            StateMismatchError: it lets some through.
        """
        if self.decision.threshold != CLOSED:
            raise StateMismatchError(
                "The model has gates with edits of another editor. Give that editor's state or its "
                "state_dir, or take the edits off: easyedit_rls.remove_gates(model)."
            )

    def begin(self, beginnings: Beginnings) -> None:
        """Take the prior's information."""
        self.decision.prior = beginnings(self._layer).solution.information().clone()

    def holds(self, layer: int, W: Tensor) -> bool:
        """Whether a layer's weight behind the gate is exactly W, (d_k, d_v), and the model's own unedited."""
        module = self._edited[layer].module
        return gate_of(module).is_untouched(module) and super().holds(layer, W)

    def hold_full(self, shards: Sequence[Shard]) -> None:
        """Keep full shards in front of the newest; what is known of one already is not computed again."""
        if [id(one.shard) for one in self._full] != [id(shard) for shard in shards]:
            self._hold_full(shards)

    def write(self, layer: int, solution: LayerSolver, keys: Tensor | None = None) -> None:
        """Let a layer's weight be its solution's; at the gate's layer, the gate goes by its covariance."""
        super().write(layer, solution)
        if layer == self._layer and self._go_by(solution):
            bare = None if keys is None else (keys if keys.dim() == 2 else keys[:, 0])  # the bare prompt's
            known = None if bare is None else self.decision.leverages(bare)
            g = [] if known is None else known[:, -1].tolist()
            n_edits = solution.n_edits + sum(one.shard.n_edits for one in self._full)
            self.gate = self._entry(n_edits, min(g, default=1.0))
            self.decision.threshold = self.gate.threshold
            if known is not None:
                is_open = self.decision.route(known) == self.decision.newest
                self.leverage = list(zip(g, is_open.tolist()))

    def show(self, moment: Moment) -> None:
        """Let weights, shards and gate be those of a moment."""
        super().show(moment)
        self._hold_full(moment.shards)
        if self._layer in moment.solutions and self._go_by(moment.solutions[self._layer]):
            self.gate = moment.history.gate or self._entry(len(moment.history.live))
            self.decision.threshold = self.gate.threshold

    def reset(self) -> None:
        """Close the gate; behind it are the model's own weights."""
        for weight in self._edited.values():
            weight.restore(weight.module.weight)
        self._hold_full(())
        self.gate, self.decision.threshold = None, CLOSED

    @contextmanager
    def restored_if_it_fails(self) -> Iterator[None]:
        """If the block fails, weights, shards and gate are bit for bit as it found them."""
        decision, gate, full = self.decision, self.gate, self._full
        found = decision.factors, decision.threshold
        weights = {layer: gate_of(weight.module).full for layer, weight in self._gated.items()}
        try:
            with super().restored_if_it_fails():
                yield
        except BaseException:
            (decision.factors, decision.threshold), self.gate, self._full = found, gate, full
            for layer, weight in self._gated.items():
                gate_of(weight.module).full = weights[layer]
            raise

    def _go_by(self, solution: LayerSolver) -> bool:
        """Take a solution's covariance; False where there are no edits, and the gate is closed."""
        if solution.n_edits == 0 and not any(one.shard.n_edits for one in self._full):
            self.gate, self.decision.threshold = None, CLOSED
            return False
        self._set_factors(solution)
        return True

    def _set_factors(self, solution: LayerSolver) -> None:
        """Of the prior, of the full shards and of now, in the decision's factors."""
        now = self._factor(solution.information(), solution.name)
        full = [one.factor for one in self._full]
        prior = inverse_factor(self._prior * self._prior_now, f"Gate at {solution.name}").float()
        self.decision.factors = torch.cat([prior, *full, now], 1)

    def _factor(self, A: Tensor, name: str) -> Tensor:
        """R with R Rᵀ the inverse of an information A in which the prior counts as it does for the gate,
        float32.
        """
        return inverse_factor(A - (1 - self._prior) * self._prior_now, f"Gate at {name}").float()

    @property
    def _prior_now(self) -> Tensor:
        """A_0 of the gate's layer."""
        if self.decision.prior is None:
            raise StateMismatchError("The gates were loaded, and can't go on from there. Give the state_dir.")
        return self.decision.prior

    def _hold_full(self, shards: Sequence[Shard]) -> None:
        """Let the model's gates have these full shards, whatever they had."""
        known = {id(one.shard): one for one in self._full}
        self._full = [
            known.get(id(shard)) or _Full(shard, self._factor(shard.information, "a full shard"))
            for shard in shards
        ]
        self._put_full()

    def _put_full(self) -> None:
        """Let the model's gates have the full shards' weights."""
        for layer, weight in self._gated.items():
            weight.hold_full([one.shard.weights[layer] for one in self._full])

    def _entry(self, n: int, least: float = 1.0) -> GateEntry:
        """What the gate goes by with n edits, the least leverage of whose prompts is told: the threshold that
        a share of ordinary tokens passes; lower where a prompt would stay shut, and then for the edits to
        come as well.
        """
        gate = self.gate
        is_due = gate is None or not gate.edits / _GROWTH < n < gate.edits * _GROWTH
        share = self._share if gate is None or gate.share is None else gate.share
        if gate is not None and not is_due and (least > gate.threshold or share >= self._most):
            return gate
        ordinary = self._ordinary()
        threshold = float(torch.quantile(ordinary, 1 - share))
        if least <= threshold:
            lowest = float(torch.quantile(ordinary, 1 - self._most))
            threshold = max(lowest, least - _BELOW)
            above = float((ordinary > threshold).double().mean())
            share = self._most if threshold == lowest else min(above, self._most)
        return GateEntry(threshold, n, share)

    def _ordinary(self) -> Tensor:
        """g of ordinary tokens, (n,), float64."""
        prior, *_, newest = self.decision.factors.chunk(1 + self.decision.newest, 1)
        if self._sample is None:
            if self._keys is None:
                raise GateError("The ledger has no threshold. Open it with an editor, memory: gated.")
            keys = self._keys()
            self._sample = keys, _square_norms(keys, prior)
        keys, norms = self._sample
        left = _square_norms(keys, newest)
        for one in self._full:
            if one.norms is None:
                one.norms = _square_norms(keys, one.factor)
            left = torch.minimum(left, one.norms)
        return (1 - left / norms).double()


def _square_norms(keys: Tensor, factor: Tensor) -> Tensor:
    """‖a R‖² of keys, (n, d_k) -> (n,)."""
    parts = [(some.to(factor) @ factor).square().sum(1) for some in torch.split(keys, _AT_ONCE)]
    return torch.cat(parts)


def find_memory(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    layout: Layout,
    hparams: RLSEditHyperParams,
) -> tuple[Layout, WeightMemory]:
    """Where the edits of a model go, as the setting `memory` says, and the layout with what is written there.

    Args:
        model: the model; gates are put on it if there shall be some and are none yet.
        tok: its tokenizer.
        layout: its modules.
        hparams: memory, gate_share, gate_share_most, gate_prior.

    Raises:
        LayoutError: some edits stand behind gates already, and others shall go into the weights, or to other
            layers.
    """
    known = gated_modules(model)
    wanted = {w.parameter_name.removesuffix(".weight"): w.module for _, w in sorted(layout.edited.items())}
    if known and (hparams.memory == "weights" or list(known.values()) != list(wanted.values())):
        if gate_of(next(iter(known.values()))).decision.threshold != CLOSED:
            raise LayoutError(
                f"The model has edits behind gates at {', '.join(known)}, beside which no others can be "
                "made. Set memory: gated and the same layers, or take them off: "
                "easyedit_rls.remove_gates(model)."
            )
        remove_gates(model)
    if hparams.memory == "weights":
        return layout, WeightMemory(layout.edited)
    edited = behind_gates(layout.edited)
    layout = replace(layout, edited=dict(edited))
    keys = partial(ordinary_keys, model, tok, layout, min(edited), hparams)
    return layout, GatedMemory(edited, hparams.gate_share, hparams.gate_prior, keys, hparams.gate_share_most)


def is_full(now: Moment, hparams: RLSEditHyperParams, gauge: Gauge) -> bool:
    """Whether edits are to go to a new shard from now on: some layer is as full as `gate_fill` says.

    Args:
        now: the moment.
        hparams: memory, solver, gate_fill.
        gauge: of this stream.
    """
    is_empty = all(one.n_edits == 0 for one in now.solutions.values())
    if hparams.memory == "weights" or hparams.solver != "rls" or is_empty:
        return False
    fills = [gauge.read(one, now.beginnings, n, now.unedited) for n, one in now.solutions.items()]
    return max(fill or 0.0 for fill in fills) >= hparams.gate_fill


def behind_gates(edited: Mapping[int, EditedWeight]) -> dict[int, GatedWeight]:
    """Edited weights behind gates, which are put there if they are not yet."""
    modules = [weight.module for _, weight in sorted(edited.items())]
    if not all(has_gate(module) for module in modules):
        put_gates(modules)
    return {
        layer: GatedWeight(weight.module, weight.parameter_name.removesuffix(".weight"))
        for layer, weight in edited.items()
    }
