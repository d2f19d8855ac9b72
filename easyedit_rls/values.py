"""Values: the hidden state that states a fact, optimised for all facts of a batch together.

For each fact, ``z = h + δ`` at the last edited layer and the subject's last token (MEMIT, Meng et al. 2023, eq. 16), with δ by Adam on

    mean over templates of the target's NLL  +  kl_factor · KL(p_δ ‖ p_0) at the subject in "{subject} is a"  +  v_weight_decay · ‖δ‖/‖h‖²

and kept in a ball of radius clamp_norm_factor · ‖h‖. The facts don't interact: the loss is a sum, Adam works coordinate by coordinate,
and each fact stops by itself.

Tokens before the subject's last one never see δ (attention is causal), so they run once and stay in the model's own key-value
cache; each step runs only the tokens from there on.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from easyedit_rls.errors import NumericalError
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.keys import Fact
from easyedit_rls.model.capture import tap
from easyedit_rls.model.forward import Batch, chunks, device_of, pad, run
from easyedit_rls.model.layout import Layout

_LOSS_GOAL = 5e-2  # ROME's and MEMIT's


@dataclass(frozen=True)
class Values:
    """Optimised values of a batch; every tensor has a row a fact and is float32.

    Attributes:
        z: target hidden states, (facts, d).
        h: hidden states before the edit, (facts, d).
        loss: the whole loss at the δ taken, (facts,), nats.
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
        values = _Optimisation(model, layout, [facts[i] for i in group], hparams).run(progress)
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


class _Rows:
    """Token rows of the facts still being optimised: the cached beginnings, the tails, and where the targets stand in them."""

    def __init__(self, model: PreTrainedModel, layout: Layout, facts: Sequence[Fact]) -> None:
        device = device_of(model)
        heads: list[tuple[int, ...]] = []
        tails: list[tuple[int, ...]] = []
        gather: list[tuple[int, int, int, int, float]] = []
        for f, fact in enumerate(facts):
            for row in fact.rows:
                first = row.target_start - 1 - row.subject_last
                gather += [
                    (len(tails), first + j, token, f, 1.0 / (len(fact.rows) * len(row.target))) for j, token in enumerate(row.target)
                ]
                heads.append(row.ids[: row.subject_last])
                tails.append(row.ids[row.subject_last : -1])
            heads.append(fact.essence.ids[: fact.essence.subject_last])
            tails.append(fact.essence.ids[fact.essence.subject_last : fact.essence.subject_last + 1])
        self.rows_per_fact = len(facts[0].rows) + 1
        self.cache, head_mask = _run_heads(model, layout, heads, device)
        self.tails = pad(tails, "right", device, after=head_mask)
        self.row, self.position, self.token, self.fact, self.weight = (torch.tensor(column, device=device) for column in zip(*gather))

    def keep(self, stay: Tensor) -> None:
        """Drop the rows of facts that are done; `stay` is a boolean over the facts here."""
        rows = stay.repeat_interleave(self.rows_per_fact).nonzero().flatten()
        if self.cache is not None:
            self.cache.batch_select_indices(rows)
        self.tails = Batch(self.tails.ids[rows], self.tails.mask[rows], self.tails.positions[rows])
        targets = stay[self.fact]
        new_fact = stay.cumsum(0) - 1
        new_row = new_fact.repeat_interleave(self.rows_per_fact) * self.rows_per_fact
        new_row += torch.arange(self.rows_per_fact, device=rows.device).repeat(len(stay))
        self.row, self.position, self.token = new_row[self.row[targets]], self.position[targets], self.token[targets]
        self.fact, self.weight = new_fact[self.fact[targets]], self.weight[targets]


def _run_heads(
    model: PreTrainedModel, layout: Layout, heads: Sequence[Sequence[int]], device: torch.device
) -> tuple[DynamicCache | None, Tensor | None]:
    """Run the tokens before the subject's last one into a cache; (None, None) if there are none."""
    if max(len(head) for head in heads) == 0:
        return None, None
    batch = pad(heads, "left", device)
    cache = DynamicCache(config=model.config)
    with tap(outputs={"end": layout.loss_layer}, stop=True):
        run(model, batch, cache=cache, use_cache=True)
    return cache, batch.mask


class _Optimisation:
    """One group of facts on their way to their values.

    `active` holds the indices of the facts not yet done; every other tensor with a row a fact has all of them, except those
    that `_loss` returns.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], hparams: RLSEditHyperParams) -> None:
        self.model, self.layout, self.hparams = model, layout, hparams
        self.rows = _Rows(model, layout, facts)
        device, width = self.rows.row.device, layout.edited[hparams.layers[-1]].shape[1]
        self.active = torch.arange(len(facts), device=device)
        self.delta = torch.zeros(len(facts), width, device=device, requires_grad=True)
        self.h = torch.empty(0)
        self.essence = torch.empty(0)
        self.final = torch.zeros_like(self.delta)
        self.final_loss, self.final_nll = (torch.zeros(len(facts), device=device) for _ in range(2))
        self.final_step = torch.zeros(len(facts), dtype=torch.long, device=device)

    def run(self, progress: "tqdm[Any] | None") -> Values:
        hp = self.hparams
        adam = torch.optim.Adam([self.delta], lr=hp.v_lr)
        for step in range(hp.v_num_grad_steps):
            adam.zero_grad()
            with torch.enable_grad():
                loss, nll, is_probable = self._loss(is_first=step == 0)
            done = self._is_done(loss, is_probable, is_last=step == hp.v_num_grad_steps - 1)
            self._finish(done, loss, nll, step)
            if progress is not None:
                progress.update(int(done.sum()))
            if bool(done.all()):
                break
            torch.autograd.backward(loss, (~done).to(loss))
            adam.step()
            self._clamp()
            if bool(done.any()):
                self.rows.keep(~done)
                self.active, self.essence = self.active[~done], self.essence[~done]
        return Values(z=self.h + self.final, h=self.h, loss=self.final_loss, nll=self.final_nll, steps=self.final_step)

    def _loss(self, is_first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Loss and NLL of the active facts, and whether their target is the most probable text in every template."""
        rows, hp, n = self.rows, self.hparams, len(self.active)
        delta = self.delta[self.active]
        target_logits, essence_logits, h = self._forward(delta)
        essence = F.log_softmax(essence_logits, dim=1)
        if is_first:
            self.h, self.essence = h, essence.detach()

        log_probs = F.log_softmax(target_logits, dim=1)
        token_log_probs = log_probs.gather(1, rows.token[:, None]).squeeze(1)
        nll = torch.zeros(n, device=delta.device).index_add(0, rows.fact, -token_log_probs * rows.weight)
        kl = F.kl_div(self.essence, essence, log_target=True, reduction="none").sum(1)
        decay = delta.norm(dim=1) / self.h[self.active].norm(dim=1) ** 2
        loss = nll + hp.kl_factor * kl + hp.v_weight_decay * decay

        with torch.no_grad():
            others = log_probs.scatter(1, rows.token[:, None], -torch.inf).amax(1)
            falls_short = (token_log_probs - others <= hp.early_stopping_margin).float()
            is_probable = torch.zeros(n, device=delta.device).index_add(0, rows.fact, falls_short) == 0
        return loss, nll, is_probable

    def _forward(self, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits at the targets (targets, vocabulary) and at the essence prompts (facts, vocabulary), and the bare h (facts, d)."""
        rows, states = self.rows, []
        added = delta[:, None].expand(-1, rows.rows_per_fact, -1).reshape(-1, delta.shape[1])

        def add_delta(hidden: Tensor) -> Tensor:  # every tail begins with the subject's last token
            states.append(hidden[:: rows.rows_per_fact, 0].detach().float())
            changed = hidden[:, :1] + added[:, None].to(hidden.dtype)
            return torch.cat([changed, hidden[:, 1:]], dim=1)

        with tap(outputs={"end": self.layout.loss_layer}, edit={self.layout.value_layer: add_delta}, stop=True) as seen:
            run(self.model, rows.tails, cache=_fork(rows.cache), use_cache=rows.cache is not None)
        hidden = seen["end"]
        essence = hidden[rows.rows_per_fact - 1 :: rows.rows_per_fact, 0]
        logits = self.layout.logits(torch.cat([hidden[rows.row, rows.position], essence]))
        return logits[: len(rows.row)], logits[len(rows.row) :], states[0]

    def _is_done(self, loss: Tensor, is_probable: Tensor, is_last: bool) -> Tensor:
        if is_last:
            return torch.ones_like(is_probable)
        if self.hparams.early_stopping == "argmax":
            return is_probable
        if self.hparams.early_stopping == "loss":
            return loss.detach() < _LOSS_GOAL
        return torch.zeros_like(is_probable)

    def _finish(self, done: Tensor, loss: Tensor, nll: Tensor, step: int) -> None:
        """Note down what the facts that are done have reached."""
        out = self.active[done]
        self.final[out] = self.delta.detach()[out]
        self.final_loss[out], self.final_nll[out] = loss.detach()[done], nll.detach()[done]
        self.final_step[out] = step

    def _clamp(self) -> None:
        """Back into the ball of radius clamp_norm_factor · ‖h‖."""
        with torch.no_grad():
            radius = self.hparams.clamp_norm_factor * self.h.norm(dim=1, keepdim=True)
            self.delta.mul_((radius / self.delta.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.0))


def _fork(cache: DynamicCache | None) -> DynamicCache | None:
    """A cache that starts with the same tensors and grows on its own (growing makes new tensors, so nothing is copied)."""
    if cache is None:
        return None
    forked = copy.copy(cache)
    forked.layers = [copy.copy(layer) for layer in cache.layers]
    return forked
