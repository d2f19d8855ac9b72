"""Suffixes: the texts of facts from the subject's last token on, which is where a value is put.

Tokens before it never see the value (attention is causal), so they run once and stay in the model's own
key-value cache; each step runs only the tokens, from the first layer on that sees the value: the one above
the value layer, or the first edited one (`at`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from easyedit_rls.facts.keys import Fact
from easyedit_rls.model.batching import Batch, device_of, pack_batches, pad, pass_overhead, run
from easyedit_rls.model.gated_weight import find_decision
from easyedit_rls.model.hooks import form_of, hidden_of, record_outputs, skip_layers, tap
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.prefix_cache import PrefixCache, fork

_NO_TOKEN = -1  # stands where an output has no target: the KL prompt's


@dataclass(frozen=True)
class SuffixRow:
    """One text, cut at the subject's last token: what stands before it never sees δ, since attention is
    causal.

    Attributes:
        fact: number of its fact.
        prefix: tokens before the subject's last one.
        suffix: tokens from there on, as far as an output is wanted.
        first: position in the suffix of the first output that is wanted.
        target: tokens that the outputs from there on shall predict; none for a KL prompt that has a row of
            its own.
        share: of its mean NLL in its fact's loss.
        must_lead: whether early stopping asks for its target to lead: that of a prompt, not that of a
            statement.
        has_kl: whether its first output is that of the KL prompt, whose distribution shall stay.
    """

    fact: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    first: int
    target: tuple[int, ...]
    share: float
    must_lead: bool
    has_kl: bool = False


def rows_of(facts: Sequence[Fact], statement_share: float, shares_kl: bool) -> list[SuffixRow]:
    """Of each fact its prompts, the bare one first, then its statements and the KL prompt.

    The KL prompt is needed up to the subject only. Where another text begins with the same tokens (a
    statement mostly does), its output there is read off that one, the shortest of them, if `shares_kl`.
    """
    rows = []
    for f, fact in enumerate(facts):
        of_statements = statement_share if fact.statements else 0.0
        own = []
        for texts, share in ((fact.rows, 1.0 - of_statements), (fact.statements, of_statements)):
            for row in texts:
                cut = row.place
                first, suffix = row.target_start - 1 - cut, row.ids[cut:-1]
                own.append(
                    SuffixRow(
                        f,
                        row.ids[:cut],
                        suffix,
                        first,
                        row.target,
                        share / len(texts),
                        must_lead=texts is fact.rows,
                    )
                )
        cut = fact.kl_prompt.place
        prefix, last = fact.kl_prompt.ids[:cut], fact.kl_prompt.ids[cut]
        alike = [
            i for i, row in enumerate(own) if shares_kl and row.prefix == prefix and row.suffix[0] == last
        ]
        if alike:
            shortest = min(alike, key=lambda i: len(own[i].suffix))
            own[shortest] = replace(own[shortest], has_kl=True)
        else:
            own.append(SuffixRow(f, prefix, (last,), 0, (), 0.0, must_lead=False, has_kl=True))
        rows += own
    return rows


@dataclass(frozen=True)
class _Pass:
    """Rows that run together.

    Attributes:
        places: which of the chosen rows.
        batch: their suffixes.
        cache: their prefixes in the model's cache, or None.
        states: of their suffixes behind the layers that see no value, (rows, length, d); None where all
            layers see it.
        is_open: which edits behind gates their tokens see, (rows, length), as `Decision.open`; None where no
            layer that runs has a gate, or the gate's own runs.
        wanted: which outputs are wanted, as indices of rows and tokens; on the CPU, since layers may lie on
            several devices.
    """

    places: list[int]
    batch: Batch
    cache: DynamicCache | None
    states: Tensor | None
    is_open: Tensor | None
    wanted: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class SuffixPasses:
    """How chosen rows run, and what the outputs of the loss layer that are wanted of them mean, in the order
    in which they come.

    Attributes:
        passes: the rows in groups of like length.
        number: for each output, which of the chosen rows it belongs to.
        targets: which of the outputs shall predict a token.
        token: that token, (targets,).
        weight: of its NLL in the fact's loss, (targets,).
        kl_places: which of the outputs are of KL prompts.
    """

    passes: list[_Pass]
    number: Tensor
    targets: Tensor
    token: Tensor
    weight: Tensor
    kl_places: Tensor


class Suffixes:
    """The suffixes of a group of facts: their states below the value, and in the model's cache what stands
    before them, their prefixes.

    Prefixes run once through all layers, suffixes once up to the value layer; each step starts from there.

    Args:
        model: the model.
        layout: its modules.
        rows: the texts.
        batch_tokens: tokens in one pass, at most.
        at: where the value is put: at the value layer's 'hidden' state, or at every edited layer's MLP
            'output'.

    Attributes:
        places: of each suffix what stands where the value is put, (n, d): its first token's hidden state at
            the value layer (n = 1), or the output of each edited layer's MLP (n = edited layers).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        rows: Sequence[SuffixRow],
        batch_tokens: int,
        at: str = "hidden",
    ) -> None:
        self._model, self._layout, self._rows, self._batch_tokens, self._at = (
            model,
            layout,
            rows,
            batch_tokens,
            at,
        )
        self._below = layout.lower_layers if at == "hidden" else layout.layers[: min(layout.edited)]
        self._prefixes = PrefixCache(model, layout.loss_layer, {row.prefix for row in rows}, batch_tokens)
        self._forms: list[Any] = []
        states: dict[int, Tensor] = {}
        places: dict[int, Tensor] = {}
        is_open: dict[int, Tensor] = {}
        has_gates_above = at == "hidden" and layout.n_lower <= max(layout.edited)
        self._decision = find_decision(layout) if has_gates_above else None
        for group in pack_batches(
            [len(row.suffix) for row in rows], batch_tokens, pass_overhead(device_of(model))
        ):
            with record_outputs(self._below) as below:
                end, outputs = self._run(*self._batch(group), layout.value_layer)
            self._forms = [form_of(output) for output in below]
            if below:
                states |= {i: state[: len(rows[i].suffix)] for i, state in zip(group, hidden_of(below[-1]))}
            places |= dict(zip(group, outputs if at == "output" else end[:, :1]))
            if self._decision is not None and self._decision.open is not None:
                decided = self._decision.open.reshape(len(group), -1)  # some models flatten rows and tokens
                is_open |= {i: row[: len(rows[i].suffix)] for i, row in zip(group, decided)}
        self._states = [states[i] for i in range(len(rows))] if self._below else None
        self._open = [is_open[i] for i in range(len(rows))] if is_open else None
        self.places = [places[i] for i in range(len(rows))]

    def plan(self, chosen: Sequence[int]) -> SuffixPasses:
        """Get ready to run rows, as often as one likes."""
        passes = []
        outputs: list[tuple[int, int, float]] = []  # which of the chosen, token, weight
        device = self.places[0].device
        price = pass_overhead(device, self.places[0].dtype)
        for group in pack_batches([len(self._rows[i].suffix) for i in chosen], self._batch_tokens, price):
            numbers = [chosen[k] for k in group]
            wanted = []
            for j, (k, row) in enumerate(zip(group, (self._rows[i] for i in numbers))):
                if row.has_kl:
                    wanted.append((j, 0))
                    outputs.append((k, _NO_TOKEN, 0.0))
                wanted += [(j, row.first + n) for n in range(len(row.target))]
                outputs += [(k, token, row.share / len(row.target)) for token in row.target]
            rows, tokens = torch.tensor(wanted).unbind(1)
            below = self._states_of(numbers), self._open_of(numbers)
            passes.append(_Pass(group, *self._batch(numbers), *below, (rows, tokens)))
        targets = [place for place, (_, token, _) in enumerate(outputs) if token != _NO_TOKEN]
        kl_places = [place for place, (_, token, _) in enumerate(outputs) if token == _NO_TOKEN]
        return SuffixPasses(
            passes,
            number=torch.tensor([k for k, _, _ in outputs], device=device),
            targets=torch.tensor(targets, dtype=torch.long, device=device),
            token=torch.tensor([outputs[place][1] for place in targets], dtype=torch.long, device=device),
            weight=torch.tensor([outputs[place][2] for place in targets], device=device),
            kl_places=torch.tensor(kl_places, dtype=torch.long, device=device),
        )

    def forward(self, plan: SuffixPasses, delta: Tensor) -> Tensor:
        """Run rows with δ, (chosen, n, d), added at the places of each; returns the wanted outputs of the
        loss layer, (wanted, d).
        """
        found = [
            self._with_value(one, delta[one.places], self._layout.loss_layer)[0][one.wanted]
            for one in plan.passes
        ]
        return torch.cat(found)

    def with_value(self, numbers: Sequence[int], delta: Tensor) -> tuple[Tensor, Tensor]:
        """What δ, (rows, n, d), makes of rows' first tokens.

        Returns:
            The edited layers' hidden states, and where values are put at outputs, their MLPs' outputs, δ
            included, each (rows, edited layers, d), float32; otherwise (rows, 0, d).
        """
        layers = {("state", number): self._layout.layers[number] for number in self._layout.edited}
        last = self._layout.layers[max(self._layout.edited)]
        parts: dict[int, tuple[Tensor, Tensor]] = {}
        for one in self.plan(numbers).passes:
            with tap(outputs=layers) as seen:
                _, outputs = self._with_value(one, delta[one.places], last)
            states = torch.stack([seen[key][:, 0].to(outputs.device) for key in layers], dim=1)
            parts |= {
                k: (state, output) for k, state, output in zip(one.places, states.float(), outputs.float())
            }
        found_states, found_outputs = zip(*(parts[k] for k in range(len(numbers))))
        return torch.stack(found_states), torch.stack(found_outputs)

    def _with_value(self, one: _Pass, delta: Tensor, until: nn.Module) -> tuple[Tensor, Tensor]:
        """A pass with δ, (rows, n, d), at its places; see `_run`."""
        edits: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
        states = one.states
        if self._at == "output":
            edits = {
                weight.module: _at_first(delta[:, i]) for i, weight in enumerate(self._layout.edited.values())
            }
        elif states is not None:
            states = _at_first(delta[:, 0])(states)
        if self._decision is not None and one.is_open is not None:
            self._decision.hold(one.is_open)
        with skip_layers(self._below, self._forms, states):
            return self._run(one.batch, one.cache, until, edits)

    def _batch(self, numbers: Sequence[int]) -> tuple[Batch, DynamicCache | None]:
        """Rows' suffixes, and the cache of their prefixes."""
        cache, prefix_mask = self._prefixes.select([self._rows[i].prefix for i in numbers])
        return pad(
            [self._rows[i].suffix for i in numbers], "right", device_of(self._model), after=prefix_mask
        ), cache

    def _states_of(self, numbers: Sequence[int]) -> Tensor | None:
        if self._states is None:
            return None
        return pad_sequence([self._states[i] for i in numbers], batch_first=True)

    def _open_of(self, numbers: Sequence[int]) -> Tensor | None:
        """Which tokens are open where a value is put: the first ones are, once it is written."""
        if self._open is None or self._decision is None:
            return None
        is_open = pad_sequence([self._open[i] for i in numbers], batch_first=True)
        is_open[:, 0] = self._decision.newest
        return is_open

    def _run(
        self,
        batch: Batch,
        cache: DynamicCache | None,
        until: nn.Module,
        edits: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run suffixes.

        Returns:
            What the module `until` gives, (rows, length, d), and where values are put at outputs, what each
            edited layer's MLP gives at the first tokens, edits included, (rows, edited layers, d); otherwise
            an empty tensor.
        """
        sites = {}
        if self._at == "output":
            sites = {layer: weight.module for layer, weight in self._layout.edited.items()}
        with tap(outputs={**sites, "end": until}, edit=edits, stop=True) as seen:
            run(self._model, batch, cache=None if cache is None else fork(cache), use_cache=cache is not None)
        end = seen["end"]
        firsts = [
            seen[layer].reshape(len(end), -1, seen[layer].shape[-1])[:, 0].to(end.device) for layer in sites
        ]
        return end, torch.stack(firsts, dim=1) if firsts else end.new_zeros(len(end), 0, end.shape[-1])


def _at_first(delta: Tensor) -> Callable[[Tensor], Tensor]:
    """Adds δ, (rows, d), at the first token of each row;
    some models flatten rows and tokens before the MLP.
    """

    def change(output: Tensor) -> Tensor:
        rows = output.reshape(len(delta), -1, output.shape[-1])
        first = rows[:, :1] + delta[:, None].to(rows)
        return torch.cat([first, rows[:, 1:]], dim=1).reshape(output.shape)

    return change
