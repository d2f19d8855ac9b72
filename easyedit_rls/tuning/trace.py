"""Causal tracing: where in a model a fact sits (ROME, Meng et al. 2022, section 2).

The subject's embeddings are blurred by noise until the model no longer knows the fact; then clean states are
put back, one place at a time. What a place gives back of the answer's probability is its indirect effect. For
MLPs and attentions a window of neighboring layers is put back at once, as in ROME. The layers whose MLPs give
back most at the subject's last token are those to edit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.progress import progress_bar
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.errors import RequestError
from easyedit_rls.model.discovery import read_structure
from easyedit_rls.model.hooks import form_of, hidden_of, record_outputs, skip_layers, tap, undisturbed
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.subject import subject_tokens

PLACES = ("first subject token", "last subject token", "first token after", "last token")
KINDS = ("hidden state", "MLP", "attention")
_SUBJECT_LAST = 1
_ENOUGH = 0.5  # of the largest effect


@dataclass(frozen=True)
class Trace:
    """Mean indirect effects over facts.

    Attributes:
        clean: mean probability of the answer, undisturbed.
        blurred: the same with the subject's embeddings blurred.
        effects: kind -> what putting clean states back gives back of the probability, (places, layers), NaN
            for a place no fact has.
        n_facts: facts that were traced.
        window: layers put back at once, for MLPs and attentions.
    """

    clean: float
    blurred: float
    effects: dict[str, Tensor]
    n_facts: int
    window: int

    def advice(self) -> list[int]:
        """Layers around the largest effect of the MLPs at the subject's last token, as far as it is at least
        half as large there.
        """
        effect = self.effects["MLP"][_SUBJECT_LAST]
        peak = int(effect.argmax())
        first = last = peak
        while first > 0 and effect[first - 1] >= _ENOUGH * effect[peak]:
            first -= 1
        while last + 1 < len(effect) and effect[last + 1] >= _ENOUGH * effect[peak]:
            last += 1
        return list(range(first, last + 1))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        effects = {
            kind: {place: row.tolist() for place, row in zip(PLACES, effect)}
            for kind, effect in self.effects.items()
        }
        numbers = {
            "clean": self.clean,
            "blurred": self.blurred,
            "n_facts": self.n_facts,
            "window": self.window,
        }
        return {**numbers, "effects": effects, "advice": self.advice()}


def refuse_untraceable(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """See that the model can take the requests' prompts.

    Returns:
        of each, its tokens and the positions of its subject's.

    Raises:
        RequestError, ModelError: see `trace`.
    """
    rows = []
    for number, request in enumerate(requests):
        try:
            rows.append(subject_tokens(tok, request.before, request.subject, request.after, request.chat))
        except RequestError as exc:
            raise exc.at(number) from None
    refuse_unfit(
        model, tok, [ids for ids, _ in rows], what="The prompt with a token to be predicted", n_new=1
    )
    return rows


def trace(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    *,
    noise: float = 3.0,
    samples: int = 5,
    window: int | None = None,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Trace:
    """Trace facts that the model knows: the answer is what it says by itself.

    Args:
        model: the model, unedited.
        tok: its tokenizer.
        requests: facts; prompt and subject count.
        noise: standard deviation of the noise, in those of the subjects' embeddings (ROME has 3).
        samples: noises a fact.
        window: layers put back at once for MLPs and attentions; a fifth of the model's if None (ROME has 10
            of 48).
        seed: of the noise.
        show_progress: None shows a bar on a terminal only.

    Raises:
        RequestError: no facts, or one is longer than the model's table of positions.
        ModelError: a token is none of the model's.
        LayoutError: the model's parts can't be told.
    """
    if not requests:
        raise RequestError("are missing. Give facts that the model knows.", field="requests")
    structure = read_structure(model)
    layers = list(model.get_submodule(structure.layers).children())
    parts = {
        "MLP": [layer.get_submodule(structure.projection) for layer in layers],
        "attention": [layer.get_submodule(structure.attention) for layer in layers],
    }
    width = max(1, round(len(layers) / 5)) if window is None else window
    effects = {kind: torch.zeros(len(PLACES), len(layers)) for kind in KINDS}
    counts, clean, blurred = torch.zeros(len(PLACES), 1), 0.0, 0.0
    rows = refuse_untraceable(model, tok, requests)
    embed = model.get_input_embeddings()
    with (
        undisturbed(model),
        progress_bar(len(rows) * len(layers) * len(KINDS), "tracing", "layer", show_progress) as bar,
    ):
        spread = torch.cat([embed.weight[[ids[i] for i in inside]].float() for ids, inside in rows]).std()
        for number, (ids, inside) in enumerate(rows):
            generator = torch.Generator().manual_seed(seed + number)
            blur = (
                torch.randn(samples, len(inside), embed.weight.shape[1], generator=generator)
                * noise
                * float(spread)
            )
            fact = _Fact(model, layers, parts, ids, inside, blur)
            has = torch.tensor([[float(position is not None)] for position in fact.positions])
            for kind in KINDS:
                effects[kind] += has * fact.effects(kind, width, bar)
            counts += has
            clean, blurred = clean + fact.clean / len(rows), blurred + fact.blurred / len(rows)
    means = {
        kind: torch.where(counts > 0, effect / counts.clamp(min=1), torch.nan)
        for kind, effect in effects.items()
    }
    return Trace(clean, blurred, means, len(rows), width)


class _Fact:
    """One fact: its clean states, and the blurred ones to start from at every layer."""

    def __init__(
        self,
        model: PreTrainedModel,
        layers: list[nn.Module],
        parts: dict[str, list[nn.Module]],
        ids: Sequence[int],
        inside: Sequence[int],
        blur: Tensor,
    ) -> None:
        self._model, self._layers, self._parts = model, layers, parts
        self._embed = model.get_input_embeddings()
        self._ids = torch.tensor([list(ids)], device=self._embed.weight.device)
        after = inside[-1] + 1
        self.positions = (
            inside[0],
            inside[-1],
            after if after < len(ids) - 1 else None,
            len(ids) - 1 if after < len(ids) else None,
        )
        self._clean_parts = dict.fromkeys(parts, torch.empty(0))
        with record_outputs(layers) as outputs, tap(outputs=self._numbered()) as seen:
            logits = self._run(1)
        self._clean_hidden = [hidden_of(output)[0] for output in outputs]
        self._clean_parts = {
            kind: torch.stack([seen[kind, i].reshape(len(ids), -1) for i in range(len(layers))])
            for kind in parts
        }
        self._answer = int(logits[0].argmax())
        self.clean = float(logits[0].softmax(0)[self._answer])
        self._forms = [form_of(output) for output in outputs]
        embedded = self._embed(self._ids).repeat(len(blur), 1, 1)
        embedded[:, list(inside)] += blur.to(embedded)
        self._embedded = embedded
        with record_outputs(layers) as outputs:
            logits = self._run(len(blur), embedded=embedded)
        self._blurred_hidden = [hidden_of(output) for output in outputs]
        self.blurred = float(self._probability(logits).mean())

    def effects(self, kind: str, window: int, bar: "tqdm[Any]") -> Tensor:
        """What putting back clean states gives back, (places, layers); 0 at places that the prompt doesn't
        have.
        """
        found = torch.zeros(len(self.positions), len(self._layers))
        places = [i for i, position in enumerate(self.positions) if position is not None]
        for layer in range(len(self._layers)):
            if kind == "hidden state":
                gained = self._put_back_state(layer, [self.positions[i] for i in places])
            else:
                first = max(0, layer - window // 2)
                gained = self._put_back_parts(
                    kind,
                    range(first, min(len(self._layers), first + window)),
                    [self.positions[i] for i in places],
                )
            found[places, layer] = gained - self.blurred
            bar.update(1)
        return found

    def _put_back_state(self, layer: int, positions: Sequence[int | None]) -> Tensor:
        hidden = self._blurred_hidden[layer].repeat(len(positions), 1, 1)
        for rows, position in self._rows(positions):
            hidden[rows, position] = self._clean_hidden[layer][position]
        return self._mean(self._run(len(hidden), below=layer + 1, hidden=hidden), len(positions))

    def _put_back_parts(self, kind: str, window: range, positions: Sequence[int | None]) -> Tensor:
        def put_back(layer: int) -> Callable[[Tensor], Tensor]:
            def change(output: Tensor) -> Tensor:
                shaped = output.clone().reshape(-1, self._ids.shape[1], output.shape[-1])
                for rows, position in self._rows(positions):
                    shaped[rows, position] = self._clean_parts[kind][layer, position]
                return shaped.reshape(output.shape)

            return change

        edits = {self._parts[kind][layer]: put_back(layer) for layer in window}
        start = window[0]
        hidden = (self._blurred_hidden[start - 1] if start else self._embedded).repeat(len(positions), 1, 1)
        with tap(edit=edits):
            logits = (
                self._run(len(hidden), below=start, hidden=hidden)
                if start
                else self._run(len(hidden), embedded=hidden)
            )
        return self._mean(logits, len(positions))

    def _rows(self, positions: Sequence[int | None]) -> list[tuple[slice, int | None]]:
        n = len(self._embedded)
        return [(slice(i * n, (i + 1) * n), position) for i, position in enumerate(positions)]

    def _run(
        self, n_rows: int, below: int = 0, hidden: Tensor | None = None, embedded: Tensor | None = None
    ) -> Tensor:
        """Logits after the last token, (rows, vocabulary), from the output of the layers below, or from
        embeddings.
        """
        ids = self._ids.expand(n_rows, -1)
        edit = {} if embedded is None else {self._embed: lambda output: embedded}
        with tap(edit=edit), skip_layers(self._layers[:below], self._forms[:below] if below else [], hidden):
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[:, -1].float()
        return logits

    def _probability(self, logits: Tensor) -> Tensor:
        return logits.softmax(1)[:, self._answer]

    def _mean(self, logits: Tensor, n: int) -> Tensor:
        return self._probability(logits).reshape(n, -1).mean(1).cpu()

    def _numbered(self) -> dict[Any, nn.Module]:
        return {
            (kind, i): module for kind, modules in self._parts.items() for i, module in enumerate(modules)
        }
