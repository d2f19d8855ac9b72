"""Values: the hidden state that states a fact, optimized for all facts of a batch together.

For each fact, ``z = h + δ`` at the last edited layer and the subject's last token (MEMIT, Meng et al. 2023,
eq. 16), with δ by Adam on

    mean over templates of the target's NLL
        +  kl_factor · KL(p_δ ‖ p_0) at the subject in "{subject} is a"
        +  v_weight_decay · ‖δ‖/‖h‖²

(with `statements`, such as "{subject}: {target}", these have `statement_share` of the NLL, and the templates
the rest), and kept in a ball of radius clamp_norm_factor · ‖h‖; what is found may be lengthened
(`overshoot`). The facts don't interact: the loss is a sum, Adam works coordinate by coordinate, and each fact
stops by itself.

With ``targets: first_layer`` z stands at the first edited layer instead, and each edited layer's goal is what
it makes of that z in the bare prompt.

Each step runs only the tokens that see δ (`suffix`). A text that already predicts its target well hardly
pulls any more, so it keeps its last gradient for some steps (`settled_nll`, `settled_every`); before a fact
is called done, all its texts are run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HyperParamsError, NumericalError
from easyedit_rls.facts.keys import Fact, value_states
from easyedit_rls.facts.suffix import Suffixes, SuffixPasses, rows_of
from easyedit_rls.facts.value_loss import RowLosses
from easyedit_rls.model.layout import Layout, cast_copy

_LOSS_GOAL = 5e-2  # ROME's and MEMIT's


@dataclass(frozen=True)
class Goal:
    """What one edited layer shall reach at the subject's last token of the bare prompt.

    Attributes:
        state: the layer's output, (facts, d), float32.
        output: what its MLP's projection writes there, (facts, d), float32, where δ is put at outputs.
    """

    state: Tensor
    output: Tensor | None


@dataclass(frozen=True)
class Values:
    """Optimized values of a batch; every tensor has a row a fact and is float32.

    Attributes:
        z: target hidden states at the last edited layer, (facts, d).
        h: hidden states there before the edit, (facts, d).
        delta: δ, (facts, n, d), which makes h into z: n is 1 at the hidden state, or the number of edited
            layers at their outputs.
        goals: layer -> what it shall reach, where δ is put at the outputs of all edited MLPs or at the first
            edited layer; otherwise None.
        loss: the whole loss at the δ found, (facts,), nats, before it is lengthened; with `values: gradient`,
            before the step.
        nll: its first term, (facts,), nats.
        steps: Adam steps taken, (facts,), int64.
    """

    z: Tensor
    h: Tensor
    delta: Tensor
    goals: dict[int, Goal] | None
    loss: Tensor
    nll: Tensor
    steps: Tensor


@dataclass(frozen=True)
class _Found:
    """What an optimization gives: δ, (facts, n, d), the h that it started from, (facts, n, d), and `Values`'
    other figures.
    """

    delta: Tensor
    h: Tensor
    loss: Tensor
    nll: Tensor
    steps: Tensor


def optimize_values(
    model: PreTrainedModel,
    layout: Layout,
    facts: Sequence[Fact],
    hparams: RLSEditHyperParams,
    progress: "tqdm[Any] | None" = None,
) -> Values:
    """Optimize the values of all facts, in groups that fit `batch_tokens`.

    With `v_dtype`, a copy of the model in that type is optimized on (see `cast_copy`), and the losses are as
    it sees them; h is the model's own. The copy has the weights that the model holds, rounded as they are
    there.

    Args:
        model: in evaluation mode, its parameters without gradient.
        layout: its modules.
        facts: tokenized facts.
        hparams: targets, v_*, clamp_norm_factor, kl_factor, statement_share, early_stopping*, overshoot,
            settled_*, batch_tokens.
        progress: a bar to advance by the facts that are done.

    Raises:
        NumericalError: a loss or a value is not finite; names the request.
    """
    dtype = model.dtype if hparams.v_dtype is None else getattr(torch, hparams.v_dtype)
    low, place = layout if dtype == model.dtype else cast_copy(layout, dtype), value_place(layout, hparams)
    found = _find(_with_value_layer(low, hparams), facts, hparams, place, progress)
    if place == "output" or hparams.targets == "first_layer":
        goals = _goals(_with_value_layer(layout, hparams), facts, hparams, place, found.delta)
        z = goals[max(goals)].state
        h = value_states(model, layout, facts, hparams.batch_tokens)
    else:
        h = found.h[:, 0] if low is layout else value_states(model, layout, facts, hparams.batch_tokens)
        z, goals = h + found.delta[:, 0], None
    return Values(z, h, found.delta, goals, found.loss, found.nll, found.steps)


def value_place(layout: Layout, hparams: RLSEditHyperParams) -> str:
    """Where values are put: as `value_at` says, or else at the MLPs' outputs if a norm stands behind an
    edited one, which lets no length through, so that not every hidden state can be reached.
    """
    has_norm = any(residual.norm is not None for residual in layout.residuals.values())
    place = hparams.value_at or ("output" if has_norm else "hidden")
    if place == "output" and hparams.targets != "residual":
        raise HyperParamsError(
            f"targets: {hparams.targets} is for values at the hidden state; "
            "these are at the outputs. Set targets: residual, or value_at: hidden."
        )
    return place


def _with_value_layer(layout: Layout, hparams: RLSEditHyperParams) -> Layout:
    """The layout with the value layer that `targets` asks for: the first edited one, or the last."""
    edge = min if hparams.targets == "first_layer" else max
    n_lower = edge(layout.edited) + 1
    return layout if n_lower == layout.n_lower else replace(layout, n_lower=n_lower)


def _find(
    layout: Layout,
    facts: Sequence[Fact],
    hparams: RLSEditHyperParams,
    place: str,
    progress: "tqdm[Any] | None",
) -> _Found:
    lengths = [
        max(len(row.ids) for row in fact.rows) * (len(fact.rows) + len(fact.statements) + 1) for fact in facts
    ]
    parts: dict[int, list[Tensor]] = {}
    for group in _groups(lengths, hparams.batch_tokens):
        optimization = _Optimization(layout, [facts[i] for i in group], hparams, place)
        found = optimization.run(progress) if hparams.values == "adam" else optimization.step_once(progress)
        for j, i in enumerate(group):
            parts[i] = [found.delta[j], found.h[j], found.loss[j], found.nll[j], found.steps[j]]
    merged = _Found(*(torch.stack(column) for column in zip(*(parts[i] for i in range(len(facts))))))
    is_finite = (merged.delta.isfinite().flatten(1).all(1) & merged.loss.isfinite()).tolist()
    if not all(is_finite):
        bad = is_finite.index(False)
        raise NumericalError(
            f"The value of request {bad} ({facts[bad].request.prompt!r}) is not finite. "
            "Check the model's weights for NaN, or lower v_lr."
        )
    return merged


def _goals(
    layout: Layout, facts: Sequence[Fact], hparams: RLSEditHyperParams, place: str, delta: Tensor
) -> dict[int, Goal]:
    """What the edited layers do in bare prompts when δ, (facts, n, d), is put in by hand."""
    bare = [replace(fact, rows=fact.rows[:1], statements=()) for fact in facts]
    rows = [row for row in rows_of(bare, 0.0, shares_kl=False) if not row.has_kl]
    suffixes = Suffixes(layout.model, layout, rows, hparams.batch_tokens, place)
    states, outputs = suffixes.with_value(range(len(rows)), delta)
    written = outputs.unbind(1) if place == "output" else [None] * len(layout.edited)
    return {layer: Goal(*goal) for layer, goal in zip(layout.edited, zip(states.unbind(1), written))}


def losses_at(
    model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], hparams: RLSEditHyperParams, delta: Tensor
) -> Tensor:
    """The whole loss of given values, (facts,), nats; in passes of `batch_tokens`, but with all prefixes in
    memory.

    Args:
        model, layout, facts, hparams: see `optimize_values`.
        delta: see `Values`.
    """
    place = value_place(layout, hparams)
    return _Optimization(_with_value_layer(layout, hparams), facts, hparams, place).loss_at(delta)


def _groups(n_tokens: Sequence[int], most: int) -> Iterator[list[int]]:
    """Facts that are optimized together: in turn as many as have no more tokens than that,
    or one that has.
    """
    group: list[int] = []
    for fact, tokens in enumerate(n_tokens):
        if group and sum(n_tokens[i] for i in group) + tokens > most:
            yield group
            group = []
        group.append(fact)
    yield group


class _Optimization:
    """One group of facts on their way to their values.

    `delta` and `gradient` live beside the model; what decides on the next step lives on the CPU, and comes
    there in one piece.
    """

    def __init__(
        self, layout: Layout, facts: Sequence[Fact], hparams: RLSEditHyperParams, place: str
    ) -> None:
        self.layout, self.hparams = layout, hparams
        # a settled row skips steps
        self.rows = rows_of(facts, hparams.statement_share, shares_kl=hparams.settled_nll == 0)
        self.suffixes = Suffixes(layout.model, layout, self.rows, hparams.batch_tokens, place)
        firsts = [next(i for i, row in enumerate(self.rows) if row.fact == f) for f in range(len(facts))]
        # where δ is put, (facts, n, d)
        self.h = torch.stack([self.suffixes.places[i].float() for i in firsts])
        self.length = self.h.norm(dim=2, keepdim=True)
        # Adam's unit: hidden states have one length, so v_lr is in their own; outputs of layers don't, so
        # there it is relative
        self.unit = (
            torch.ones_like(self.length) if place == "hidden" else self.length / self.h.shape[2] ** 0.5
        )
        self.delta = torch.zeros_like(self.h)
        self.last_plan: tuple[Tensor, SuffixPasses] | None = None  # the rows that ran last
        self.judge = RowLosses(len(facts), hparams.kl_factor, hparams.early_stopping_margin)
        self.fact = torch.tensor([row.fact for row in self.rows])
        self.share = torch.tensor([row.share for row in self.rows])
        self.must_lead = torch.tensor([row.must_lead for row in self.rows])
        self.has_kl = torch.tensor([row.has_kl for row in self.rows])
        # of each row when it last ran: its part of the loss, by its target and by the divergence (for rows
        # that have it), that part's gradient, and whether its target was not the most probable text
        self.part, self.divergence = torch.zeros(2, len(self.rows))
        self.gradient = self.h.new_zeros(len(self.rows), *self.h.shape[1:])
        self.falls_short = torch.zeros(len(self.rows), dtype=torch.bool)
        self.age = torch.full((len(self.rows),), hparams.settled_every)  # steps since then
        self.decay = torch.zeros(len(facts))
        self.is_active = torch.ones(len(facts), dtype=torch.bool)

    def run(self, progress: "tqdm[Any] | None") -> _Found:
        """Adam, until each fact is done."""
        hp, n_facts = self.hparams, len(self.h)
        final = torch.zeros_like(self.h)
        final_loss, final_nll = torch.zeros(2, n_facts)
        steps = torch.zeros(n_facts, dtype=torch.long)
        in_units = torch.zeros_like(self.delta)
        adam = torch.optim.Adam([in_units], lr=hp.v_lr, betas=(hp.v_momentum, 0.999))
        for step in range(hp.v_num_grad_steps):
            is_last = step == hp.v_num_grad_steps - 1
            self.age += 1
            self._refresh(self._due(is_last), wants_gradient=not is_last)
            if len(kept := self._kept(self._done(is_last))):
                self._refresh(kept, wants_gradient=True)
            done = self._done(is_last)
            final[done.to(final.device)] = self.delta[done.to(final.device)]
            final_loss[done], final_nll[done], steps[done] = self._loss()[done], self._nll()[done], step
            if progress is not None:
                progress.update(int(done.sum()))
            self.is_active &= ~done
            if not bool(self.is_active.any()):
                break
            in_units.grad = (
                self._whole_gradient() * self.unit * self.is_active.to(self.delta.device)[:, None, None]
            )
            adam.step()
            self.delta = self._clamped(self.unit * in_units)
            in_units.copy_(self.delta / self.unit)
        final = self._clamped(hp.overshoot * final)
        to = self.h.device
        return _Found(final, self.h, loss=final_loss.to(to), nll=final_nll.to(to), steps=steps.to(to))

    def step_once(self, progress: "tqdm[Any] | None") -> _Found:
        """One step of a given length down the gradient at δ = 0, as UltraEdit (arXiv 2505.14679) takes its
        values from one backward pass.

        The losses are those before the step, since nothing is run after it.
        """
        self._refresh(self._due(is_last=True), wants_gradient=True)
        length = self.hparams.gradient_step * self.length
        if progress is not None:
            progress.update(len(self.h))
        to = self.h.device
        return _Found(
            -length * F.normalize(self._whole_gradient(), dim=2),
            self.h,
            loss=self._loss().to(to),
            nll=self._nll().to(to),
            steps=torch.ones(len(self.h), dtype=torch.long, device=to),
        )

    def loss_at(self, delta: Tensor) -> Tensor:
        """The whole loss at a δ, (facts,), on the CPU."""
        everything = torch.arange(len(self.rows))
        self._refresh(everything, wants_gradient=False)  # at δ = 0, which the divergence is measured from
        self.delta = delta.to(self.delta)
        self._refresh(everything, wants_gradient=False)
        return self._loss()

    def _due(self, is_last: bool) -> Tensor:
        """Rows that must run in this step: those of active facts; before the last step not the settled ones
        that ran a short while ago.
        """
        due = self.is_active[self.fact]
        if not is_last:
            is_settled = ~self.has_kl & (self.part < self.hparams.settled_nll * self.share)
            due = due & ~(is_settled & (self.age < self.hparams.settled_every))
        return due.nonzero().flatten()

    def _kept(self, candidates: Tensor) -> Tensor:
        """Rows of facts that look done, (facts,), whose figures are of an earlier step."""
        return (candidates[self.fact] & (self.age > 0)).nonzero().flatten()

    def _refresh(self, chosen: Tensor, wants_gradient: bool) -> None:
        """Run rows, and note down their parts of the loss and, on demand, the gradients of those."""
        where = chosen.to(self.h.device)
        fact = self.fact.to(self.h.device)[where]
        delta = self.delta[fact].requires_grad_(wants_gradient)
        plan = self._plan(chosen)
        with torch.set_grad_enabled(wants_gradient):
            logits = self.layout.logits(self.suffixes.forward(plan, delta))
            logits = logits.to(self.h.device)  # the head may lie elsewhere
        part, divergence, falls_short, slope = self.judge(logits.detach(), plan, fact)
        if wants_gradient:
            (self.gradient[where],) = torch.autograd.grad(logits, delta, slope)
        decay = self.hparams.v_weight_decay * (self.delta.norm(dim=2, keepdim=True) / self.length**2).mean(
            (1, 2)
        )
        known = torch.cat([part, divergence, falls_short, decay]).cpu()
        part, divergence, falls_short = known[: 3 * len(fact)].reshape(3, -1)
        self.part[chosen], self.divergence[chosen], self.falls_short[chosen] = (
            part,
            divergence,
            falls_short > 0,
        )
        self.decay = known[3 * len(fact) :]
        self.age[chosen] = 0

    def _plan(self, chosen: Tensor) -> SuffixPasses:
        """That of the last step, where the same rows run again; otherwise a new one."""
        if self.last_plan is None or not torch.equal(self.last_plan[0], chosen):
            self.last_plan = None  # its memory first
            self.last_plan = (chosen, self.suffixes.plan(chosen.tolist()))
        return self.last_plan[1]

    def _whole_gradient(self) -> Tensor:
        """Of each fact's loss in its δ, (facts, n, d)."""
        parts: Tensor = torch.zeros_like(self.h).index_add_(0, self.fact.to(self.h.device), self.gradient)
        decay: Tensor = (
            self.hparams.v_weight_decay / self.h.shape[1] * F.normalize(self.delta, dim=2) / self.length**2
        )
        return parts + decay

    def _nll(self) -> Tensor:
        return torch.zeros_like(self.decay).index_add(0, self.fact, self.part)

    def _loss(self) -> Tensor:
        return (
            self._nll() + torch.zeros_like(self.decay).index_add(0, self.fact, self.divergence) + self.decay
        )

    def _done(self, is_last: bool) -> Tensor:
        """Active facts that stop here, (facts,)."""
        if is_last:
            return self.is_active.clone()
        if self.hparams.early_stopping == "argmax":
            is_behind = (self.falls_short & self.must_lead).float()
            return self.is_active & (torch.zeros_like(self.decay).index_add(0, self.fact, is_behind) == 0)
        if self.hparams.early_stopping == "loss":
            return self.is_active & (self._loss() < _LOSS_GOAL)
        return torch.zeros_like(self.is_active)

    def _clamped(self, delta: Tensor) -> Tensor:
        """Back into the ball of radius clamp_norm_factor · ‖h‖, at each place."""
        radius = self.hparams.clamp_norm_factor * self.length
        clamped: Tensor = delta * (radius / delta.norm(dim=2, keepdim=True).clamp(min=1e-12)).clamp(max=1.0)
        return clamped
