"""Tails: the texts of facts from the subject's last token on, which is where a value is put.

Tokens before it never see the value (attention is causal), so they run once and stay in the model's own key-value cache; each step runs
only the tokens, from the value layer on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from easyedit_rls.keys import Fact
from easyedit_rls.model.capture import form_of, hidden_of, record_outputs, skip_layers, tap
from easyedit_rls.model.forward import Batch, chunks, device_of, pad, price_of_pass, run
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.prefix import Heads, fork

_NO_TOKEN = -1  # stands where an output has no target: the essence prompt's


@dataclass(frozen=True)
class Row:
    """One text, cut at the subject's last token: what stands before it never sees δ, since attention is causal.

    Attributes:
        fact: number of its fact.
        head: tokens before the subject's last one.
        tail: tokens from there on, as far as an output is wanted.
        first: position in the tail of the first output that is wanted.
        target: tokens that the outputs from there on shall predict; none for an essence prompt that has a row of its own.
        share: of its mean NLL in its fact's loss.
        must_lead: whether early stopping asks for its target to lead: that of a prompt, not that of a statement.
        has_essence: whether its first output is that of the essence prompt, whose distribution shall stay.
    """

    fact: int
    head: tuple[int, ...]
    tail: tuple[int, ...]
    first: int
    target: tuple[int, ...]
    share: float
    must_lead: bool
    has_essence: bool = False


def rows_of(facts: Sequence[Fact], statement_share: float, shares_essence: bool) -> list[Row]:
    """Of each fact its prompts, the bare one first, then its statements and the essence prompt.

    The essence prompt is needed up to the subject only. Where another text begins with the same tokens (a statement mostly does), its
    output there is read off that one, the shortest of them, if `shares_essence`.
    """
    rows = []
    for f, fact in enumerate(facts):
        of_statements = statement_share if fact.statements else 0.0
        own = []
        for texts, share in ((fact.rows, 1.0 - of_statements), (fact.statements, of_statements)):
            for row in texts:
                cut = row.subject_last
                first, tail = row.target_start - 1 - cut, row.ids[cut:-1]
                own.append(Row(f, row.ids[:cut], tail, first, row.target, share / len(texts), must_lead=texts is fact.rows))
        cut = fact.essence.subject_last
        head, last = fact.essence.ids[:cut], fact.essence.ids[cut]
        alike = [i for i, row in enumerate(own) if shares_essence and row.head == head and row.tail[0] == last]
        if alike:
            shortest = min(alike, key=lambda i: len(own[i].tail))
            own[shortest] = replace(own[shortest], has_essence=True)
        else:
            own.append(Row(f, head, (last,), 0, (), 0.0, must_lead=False, has_essence=True))
        rows += own
    return rows


@dataclass(frozen=True)
class _Pass:
    """Rows that run together.

    Attributes:
        places: which of the chosen rows.
        batch: their tails.
        cache: their heads in the model's cache, or None.
        states: of their tails at the value layer, (rows, length, d).
        wanted: which outputs are wanted, as indices of rows and tokens; on the CPU, since layers may lie on several devices.
    """

    places: list[int]
    batch: Batch
    cache: DynamicCache | None
    states: Tensor
    wanted: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """How chosen rows run, and what the outputs of the loss layer that are wanted of them mean, in the order in which they come.

    Attributes:
        passes: the rows in groups of like length.
        number: for each output, which of the chosen rows it belongs to.
        targets: which of the outputs shall predict a token.
        token: that token, (targets,).
        weight: of its NLL in the fact's loss, (targets,).
        essences: which of the outputs are of essence prompts.
    """

    passes: list[_Pass]
    number: Tensor
    targets: Tensor
    token: Tensor
    weight: Tensor
    essences: Tensor


class Tails:
    """The tails of a group of facts: their states at the value layer, and in the model's cache what stands before them, their heads.

    Heads run once through all layers, tails once up to the value layer; each step starts from there.

    Args:
        model: the model.
        layout: its modules.
        rows: the texts.
        batch_tokens: tokens in one pass, at most.

    Attributes:
        states: of each tail at the value layer, (length, d).
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, rows: Sequence[Row], batch_tokens: int) -> None:
        self._model, self._layout, self._rows, self._batch_tokens = model, layout, rows, batch_tokens
        self._heads = Heads(model, layout.loss_layer, {row.head for row in rows}, batch_tokens)
        found: dict[int, Tensor] = {}
        for group in chunks([len(row.tail) for row in rows], batch_tokens, price_of_pass(device_of(model))):
            with record_outputs(layout.lower_layers) as below:
                self._run(*self._batch(group), layout.value_layer)
            self._forms = [form_of(output) for output in below]
            found |= {i: state[: len(rows[i].tail)] for i, state in zip(group, hidden_of(below[-1]))}
        self.states = [found[i] for i in range(len(rows))]

    def plan(self, chosen: Sequence[int]) -> Plan:
        """Get ready to run rows, as often as one likes."""
        passes = []
        outputs: list[tuple[int, int, float]] = []  # which of the chosen, token, weight
        price = price_of_pass(self.states[0].device, self.states[0].dtype)
        for group in chunks([len(self._rows[i].tail) for i in chosen], self._batch_tokens, price):
            numbers = [chosen[k] for k in group]
            wanted = []
            for j, (k, row) in enumerate(zip(group, (self._rows[i] for i in numbers))):
                if row.has_essence:
                    wanted.append((j, 0))
                    outputs.append((k, _NO_TOKEN, 0.0))
                wanted += [(j, row.first + n) for n in range(len(row.target))]
                outputs += [(k, token, row.share / len(row.target)) for token in row.target]
            states = pad_sequence([self.states[i] for i in numbers], batch_first=True)
            rows, tokens = torch.tensor(wanted).unbind(1)
            passes.append(_Pass(group, *self._batch(numbers), states, (rows, tokens)))
        device = self.states[0].device
        targets = [place for place, (_, token, _) in enumerate(outputs) if token != _NO_TOKEN]
        essences = [place for place, (_, token, _) in enumerate(outputs) if token == _NO_TOKEN]
        return Plan(
            passes,
            number=torch.tensor([k for k, _, _ in outputs], device=device),
            targets=torch.tensor(targets, dtype=torch.long, device=device),
            token=torch.tensor([outputs[place][1] for place in targets], dtype=torch.long, device=device),
            weight=torch.tensor([outputs[place][2] for place in targets], device=device),
            essences=torch.tensor(essences, dtype=torch.long, device=device),
        )

    def forward(self, plan: Plan, delta: Tensor) -> Tensor:
        """Run rows from the value layer on, with δ, (chosen, d), added at the first token of each; returns the wanted outputs, (n, d)."""
        found = []
        for one in plan.passes:
            first = one.states[:, :1] + delta[one.places][:, None].to(one.states.dtype)
            with skip_layers(self._layout.lower_layers, self._forms, torch.cat([first, one.states[:, 1:]], dim=1)):
                found.append(self._run(one.batch, one.cache, self._layout.loss_layer)[one.wanted])
        return torch.cat(found)

    def _batch(self, numbers: Sequence[int]) -> tuple[Batch, DynamicCache | None]:
        """Rows' tails, and the cache of their heads."""
        cache, head_mask = self._heads.of([self._rows[i].head for i in numbers])
        return pad([self._rows[i].tail for i in numbers], "right", device_of(self._model), after=head_mask), cache

    def _run(self, batch: Batch, cache: DynamicCache | None, until: nn.Module) -> Tensor:
        with tap(outputs={"end": until}, stop=True) as seen:
            run(self._model, batch, cache=None if cache is None else fork(cache), use_cache=cache is not None)
        return seen["end"]
