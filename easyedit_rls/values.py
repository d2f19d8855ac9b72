"""Values: the hidden state that states a fact, optimised for all facts of a batch together.

For each fact, ``z = h + δ`` at the last edited layer and the subject's last token (MEMIT, Meng et al. 2023, eq. 16), with δ by Adam on

    mean over templates of the target's NLL  +  kl_factor · KL(p_δ ‖ p_0) at the subject in "{subject} is a"  +  v_weight_decay · ‖δ‖/‖h‖²

and kept in a ball of radius clamp_norm_factor · ‖h‖. The facts don't interact: the loss is a sum, Adam works coordinate by coordinate,
and each fact stops by itself.

Tokens before the subject's last one never see δ (attention is causal), so they run once and stay in the model's own key-value
cache; each step runs only the tokens from there on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from easyedit_rls.errors import NumericalError
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.keys import Fact
from easyedit_rls.model.capture import form_of, hidden_of, record_outputs, skip_layers, tap
from easyedit_rls.model.forward import Batch, chunks, device_of, pad, run
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.prefix import Heads, fork

_LOSS_GOAL = 5e-2  # ROME's and MEMIT's
_NO_TOKEN = -1  # stands where an output has no target: the essence prompt's


@dataclass(frozen=True)
class Values:
    """Optimised values of a batch; every tensor has a row a fact and is float32.

    Attributes:
        z: target hidden states, (facts, d).
        h: hidden states before the edit, (facts, d).
        loss: the whole loss at the δ taken, (facts,), nats; with `values: gradient`, before the step.
        nll: its first term, (facts,), nats.
        steps: Adam steps taken, (facts,), int64.
    """

    z: Tensor
    h: Tensor
    loss: Tensor
    nll: Tensor
    steps: Tensor


def optimise_values(
    model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], hparams: RLSEditHyperParams, progress: "tqdm[Any] | None" = None
) -> Values:
    """Optimise the values of all facts, in groups that fit `batch_tokens`.

    Args:
        model: in evaluation mode, its parameters without gradient.
        layout: its modules.
        facts: tokenised facts.
        hparams: v_lr, v_num_grad_steps, clamp_norm_factor, v_weight_decay, kl_factor, early_stopping.
        progress: a bar to advance by the facts that are done.

    Raises:
        NumericalError: a loss or a value is not finite; names the request.
    """
    lengths = [max(len(row.ids) for row in fact.rows) * (len(fact.rows) + 1) for fact in facts]
    parts: dict[int, list[Tensor]] = {}
    for group in chunks(lengths, hparams.batch_tokens):
        optimisation = _Optimisation(model, layout, [facts[i] for i in group], hparams)
        values = optimisation.run(progress) if hparams.values == "adam" else optimisation.step_once(progress)
        for j, i in enumerate(group):
            parts[i] = [values.z[j], values.h[j], values.loss[j], values.nll[j], values.steps[j]]
    merged = Values(*(torch.stack(column) for column in zip(*(parts[i] for i in range(len(facts))))))
    bad = (~(torch.isfinite(merged.z).all(1) & torch.isfinite(merged.loss))).nonzero().flatten().tolist()
    if bad:
        raise NumericalError(
            f"The value of request {bad[0]} ({facts[bad[0]].request.prompt!r}) is not finite. "
            "Check the model's weights for NaN, or lower v_lr."
        )
    return merged


@dataclass(frozen=True)
class _Row:
    """One text, cut at the subject's last token: what stands before it never sees δ, since attention is causal.

    Attributes:
        fact: number of its fact.
        is_bare: whether it is the prompt without a text in front.
        head: tokens before the subject's last one.
        tail: tokens from there on, as far as an output is wanted.
        first: position in the tail of the first output that is wanted.
        target: tokens that those outputs shall predict; none for the essence prompt, whose distribution shall stay.
        weight: of each target token in its fact's loss.
    """

    fact: int
    head: tuple[int, ...]
    tail: tuple[int, ...]
    is_bare: bool
    first: int
    target: tuple[int, ...]
    weight: float


def _rows(facts: Sequence[Fact]) -> list[_Row]:
    rows = []
    for f, fact in enumerate(facts):
        for r, row in enumerate(fact.rows):
            cut, weight = row.subject_last, 1.0 / (len(fact.rows) * len(row.target))
            rows.append(_Row(f, row.ids[:cut], row.ids[cut:-1], r == 0, row.target_start - 1 - cut, row.target, weight))
        cut = fact.essence.subject_last
        rows.append(_Row(f, fact.essence.ids[:cut], fact.essence.ids[cut : cut + 1], False, 0, (), 0.0))
    return rows


class _Group:
    """Rows that run together: their heads in the model's cache, their tails' states at the value layer, and where outputs are wanted.

    Heads run once through all layers. Tails run once up to the value layer; each step starts from there.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, rows: Sequence[_Row], heads: Heads) -> None:
        device = device_of(model)
        self.cache, head_mask = heads.of([row.head for row in rows])
        self.tails = pad([row.tail for row in rows], "right", device, after=head_mask)
        with record_outputs(layout.lower_layers) as below:
            self._run(model, layout.value_layer)
        self.states, self.forms = hidden_of(below[-1]), [form_of(output) for output in below]
        self.fact, self.is_bare = (torch.tensor([getattr(row, name) for row in rows], device=device) for name in ("fact", "is_bare"))
        wanted = [(r, row.first + j, token, row.weight) for r, row in enumerate(rows) for j, token in enumerate(row.target or (_NO_TOKEN,))]
        self.row, self.position, self.token, self.weight = (torch.tensor(column, device=device) for column in zip(*wanted))

    def forward(self, model: PreTrainedModel, layout: Layout, delta: Tensor) -> Tensor:
        """Outputs of the loss layer where they are wanted, (wanted, d), with δ (rows, d) added at each row's first token."""
        changed = self.states[:, :1] + delta[:, None].to(self.states.dtype)
        with skip_layers(layout.lower_layers, self.forms, torch.cat([changed, self.states[:, 1:]], dim=1)):
            return self._run(model, layout.loss_layer)[self.row, self.position]

    def keep(self, stay: Tensor) -> bool:
        """Drop the rows of facts that are done; returns whether any row is left."""
        stays = stay[self.fact]
        rows = stays.nonzero().flatten()
        wanted = stays[self.row]
        if self.cache is not None:
            self.cache.batch_select_indices(rows)
        self.tails = Batch(self.tails.ids[rows], self.tails.mask[rows], self.tails.positions[rows])
        self.row = (stays.cumsum(0) - 1)[self.row[wanted]]
        self.position, self.token, self.weight = self.position[wanted], self.token[wanted], self.weight[wanted]
        self.states, self.fact = self.states[rows], self.fact[rows]
        return bool(len(rows))

    def _run(self, model: PreTrainedModel, until: nn.Module) -> Tensor:
        with tap(outputs={"end": until}, stop=True) as seen:
            cache = None if self.cache is None else fork(self.cache)
            run(model, self.tails, cache=cache, use_cache=cache is not None)
        return seen["end"]


class _Optimisation:
    """One group of facts on their way to their values. Every tensor has a row a fact, also for those that are done."""

    def __init__(self, model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], hparams: RLSEditHyperParams) -> None:
        self.model, self.layout, self.hparams = model, layout, hparams
        rows = _rows(facts)
        heads = Heads(model, layout.loss_layer, {row.head for row in rows}, hparams.batch_tokens)
        packed = chunks([len(row.tail) for row in rows], hparams.batch_tokens)
        self.groups = [_Group(model, layout, [rows[i] for i in group], heads) for group in packed]
        self.h = _bare_states(self.groups, len(facts))
        self.delta = torch.zeros_like(self.h, requires_grad=True)
        self.is_active = torch.ones(len(facts), dtype=torch.bool, device=self.h.device)
        self.essence: Tensor | None = None  # log-probabilities after "{subject} is a" before the edit, (facts, vocabulary)

    def run(self, progress: "tqdm[Any] | None") -> Values:
        """Adam, until each fact is done."""
        hp, n_facts = self.hparams, len(self.h)
        final = torch.zeros_like(self.h)
        final_loss, final_nll = self.h.new_zeros(2, n_facts)
        steps = torch.zeros(n_facts, dtype=torch.long, device=self.h.device)
        adam = torch.optim.Adam([self.delta], lr=hp.v_lr)
        for step in range(hp.v_num_grad_steps):
            is_last = step == hp.v_num_grad_steps - 1
            with torch.set_grad_enabled(not is_last):
                loss, nll, is_probable = self._loss()
            done = self.is_active & self._is_done(loss, is_probable, is_last)
            final[done], final_loss[done], final_nll[done], steps[done] = (
                self.delta.detach()[done],
                loss.detach()[done],
                nll.detach()[done],
                step,
            )
            if progress is not None:
                progress.update(int(done.sum()))
            self.is_active &= ~done
            if not bool(self.is_active.any()):
                break
            (self.delta.grad,) = torch.autograd.grad(loss, self.delta, self.is_active.to(loss))
            adam.step()
            self._clamp()
            if bool(done.any()):
                self.groups = [group for group in self.groups if group.keep(self.is_active)]
        return Values(z=self.h + final, h=self.h, loss=final_loss, nll=final_nll, steps=steps)

    def step_once(self, progress: "tqdm[Any] | None") -> Values:
        """One step of a given length down the gradient at δ = 0, as UltraEdit (arXiv 2505.14679) takes its values from one backward pass.

        The losses are those before the step, since nothing is run after it.
        """
        with torch.enable_grad():
            loss, nll, _ = self._loss()
        (gradient,) = torch.autograd.grad(loss, self.delta, torch.ones_like(loss))
        length = self.hparams.gradient_step * self.h.norm(dim=1, keepdim=True)
        if progress is not None:
            progress.update(len(self.h))
        steps = torch.ones(len(self.h), dtype=torch.long, device=self.h.device)
        return Values(z=self.h - length * F.normalize(gradient, dim=1), h=self.h, loss=loss.detach(), nll=nll.detach(), steps=steps)

    def _loss(self) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and NLL of each fact, and whether its target is the most probable text in every template; (facts,) each."""
        hp, groups = self.hparams, self.groups
        states = torch.cat([group.forward(self.model, self.layout, self.delta[group.fact]) for group in groups])
        token, weight = (torch.cat([getattr(group, name) for group in groups]) for name in ("token", "weight"))
        fact = torch.cat([group.fact[group.row] for group in groups])
        log_probs = F.log_softmax(self.layout.logits(states), dim=1)
        is_target = token != _NO_TOKEN
        zeros = torch.zeros(len(self.h), device=self.h.device)
        kl = zeros.index_add(0, fact[~is_target], self._essence_divergence(log_probs[~is_target], fact[~is_target]))

        log_probs, token, weight, fact = log_probs[is_target], token[is_target], weight[is_target], fact[is_target]
        token_log_probs = log_probs.gather(1, token[:, None]).squeeze(1)
        nll = zeros.index_add(0, fact, -token_log_probs * weight)
        decay = self.delta.norm(dim=1) / self.h.norm(dim=1) ** 2
        with torch.no_grad():
            others = log_probs.scatter(1, token[:, None], -torch.inf).amax(1)
            falls_short = (token_log_probs - others <= hp.early_stopping_margin).float()
            is_probable = zeros.index_add(0, fact, falls_short) == 0
        return nll + hp.kl_factor * kl + hp.v_weight_decay * decay, nll, is_probable

    def _essence_divergence(self, log_probs: Tensor, fact: Tensor) -> Tensor:
        """KL(p_δ ‖ p_0) after "{subject} is a", a number for each row; the first call notes p_0 down."""
        if self.essence is None:
            self.essence = log_probs.new_empty(len(self.h), log_probs.shape[1])
            self.essence[fact] = log_probs.detach()
        return F.kl_div(self.essence[fact], log_probs, log_target=True, reduction="none").sum(1)

    def _is_done(self, loss: Tensor, is_probable: Tensor, is_last: bool) -> Tensor:
        if is_last:
            return torch.ones_like(is_probable)
        if self.hparams.early_stopping == "argmax":
            return is_probable
        if self.hparams.early_stopping == "loss":
            return loss.detach() < _LOSS_GOAL
        return torch.zeros_like(is_probable)

    def _clamp(self) -> None:
        """Back into the ball of radius clamp_norm_factor · ‖h‖."""
        with torch.no_grad():
            radius = self.hparams.clamp_norm_factor * self.h.norm(dim=1, keepdim=True)
            self.delta.mul_((radius / self.delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))


def _bare_states(groups: Sequence[_Group], n_facts: int) -> Tensor:
    """h of each fact, (facts, d), float32: the value layer's output at the subject's last token of the bare prompt."""
    states = groups[0].states
    h = torch.zeros(n_facts, states.shape[-1], device=states.device)
    for group in groups:
        h[group.fact[group.is_bare]] = group.states[group.is_bare, 0].float()
    return h
