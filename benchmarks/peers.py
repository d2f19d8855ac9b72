"""Who we are timed against: AlphaEdit of an EasyEdit checkout, or, without one, a plain loop that works as it
does.
"""

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from easyedit_rls import RLSEditHyperParams
from easyedit_rls.anchors.cache import moments
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import EDITORS, Setup
from easyedit_rls.facts.keys import Fact, locate_facts
from easyedit_rls.model.hooks import tap
from easyedit_rls.model.layout import find_layout

_LOSS = re.compile(r"^loss ([\d.]+) = ")
_DONE = re.compile(r"^Init norm .* \| Delta norm ", re.MULTILINE)


def make_peer(
    model: Any, tok: Any, hparams: RLSEditHyperParams, templates: Sequence[str]
) -> "AlphaEdit | PlainLoop":
    """AlphaEdit where `EASYEDIT_HOME` or the path has EasyEdit, else the plain loop.

    Args:
        model: the unedited model; the peer edits it in place.
        tok: its tokenizer.
        hparams: layers, value optimization and moments, which the peer shares with us.
        templates: texts to put before each prompt, besides the bare prompt.
    """
    is_there = bool(os.environ.get("EASYEDIT_HOME"))
    return (
        AlphaEdit(model, tok, hparams, templates) if is_there else PlainLoop(model, tok, hparams, templates)
    )


class AlphaEdit:
    """EasyEdit's own AlphaEdit, with our layers, value settings, templates and moments."""

    name = "AlphaEdit of the EasyEdit checkout"

    def __init__(self, model: Any, tok: Any, hparams: RLSEditHyperParams, templates: Sequence[str]) -> None:
        self._editor = EDITORS.get("AlphaEdit").begin(Setup(model, tok, hparams, templates, {"L2": 1.0}))

    def edit(self, requests: Sequence[EditRequest]) -> list[float]:
        """Edit one batch; returns each fact's final loss, as printed."""
        losses, last = [], 0.0
        for line in self._editor.edit(requests).splitlines():
            if match := _LOSS.match(line):
                last = float(match[1])
            elif _DONE.match(line):
                losses.append(last)
        return losses


class PlainLoop:
    """What AlphaEdit does, as plainly: each fact alone, whole texts through all layers at every step, keys of
    whole texts, one solve.
    """

    name = "a plain reference loop (no EasyEdit checkout: set EASYEDIT_HOME)"

    def __init__(self, model: Any, tok: Any, hp: RLSEditHyperParams, templates: Sequence[str]) -> None:
        self.model, self.tok, self.hparams, self.templates = model, tok, hp, templates
        self.layout = find_layout(model, hp)
        self.gram = {
            layer: hp.mom2_update_weight * moment.mean for layer, moment in moments(model, tok, hp).items()
        }
        model.requires_grad_(False)

    def edit(self, requests: Sequence[EditRequest]) -> list[float]:
        """Edit one batch; returns each fact's final loss."""
        facts = locate_facts(self.tok, requests, self.templates)
        values = [self._value(fact) for fact in facts]
        z = torch.stack([value for value, _ in values])
        for i, (layer, weight) in enumerate(self.layout.edited.items()):
            K = torch.stack([self._states(fact, weight.module, True) for fact in facts])
            h = torch.stack([self._states(fact, self.layout.value_layer, False) for fact in facts])
            self.gram[layer] = self.gram[layer] + K.T @ K
            step = torch.linalg.solve(self.gram[layer], K.T @ ((z - h) / (len(self.layout.edited) - i)))
            weight.write(weight.read() + step)
        return [loss for _, loss in values]

    @torch.no_grad()
    def _states(self, fact: Fact, module: torch.nn.Module, is_input: bool) -> torch.Tensor:
        found = []
        for row in fact.rows if is_input else fact.rows[:1]:
            with tap(**{"inputs" if is_input else "outputs": {"state": module}}) as seen:
                self.model(torch.tensor([row.ids]))
            found.append(seen["state"][0, row.place])
        return found[0] if len(found) == 1 else 0.5 * found[0] + 0.5 * torch.stack(found[1:]).mean(0)

    def _value(self, fact: Fact) -> tuple[torch.Tensor, float]:
        hp, h = self.hparams, self._states(fact, self.layout.value_layer, False)
        delta = torch.zeros_like(h, requires_grad=True)
        adam, rows, p_0 = torch.optim.Adam([delta], lr=hp.v_lr), (*fact.rows, fact.kl_prompt), None
        for step in range(hp.v_num_grad_steps):
            losses = []
            for row in rows:
                at = row.place
                add = (  # noqa: E731
                    lambda hidden, at=at: torch.cat(
                        [hidden[:, :at], hidden[:, at : at + 1] + delta, hidden[:, at + 1 :]], 1
                    )
                )
                with tap(edit={self.layout.value_layer: add}):
                    log_probs = F.log_softmax(self.model(torch.tensor([row.ids])).logits[0], dim=1)
                if row is fact.kl_prompt:
                    p_0 = log_probs[at].detach() if p_0 is None else p_0
                    losses.append(
                        hp.kl_factor * F.kl_div(p_0, log_probs[at], log_target=True, reduction="sum")
                    )
                else:
                    there = log_probs[row.target_start - 1 : len(row.ids) - 1].gather(
                        1, torch.tensor(row.target)[:, None]
                    )
                    losses.append(-there.mean() / len(fact.rows))
            loss = torch.stack(losses).sum() + hp.v_weight_decay * delta.norm() / h.norm() ** 2
            if loss < 0.05 or step == hp.v_num_grad_steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(loss, delta)
            adam.step()
            with torch.no_grad():
                delta.mul_((hp.clamp_norm_factor * h.norm() / delta.norm()).clamp(max=1.0))
        return (h + delta).detach(), float(loss)
