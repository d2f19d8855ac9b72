"""Keys: where a fact sits (MEMIT, Meng et al. 2023, section 4).

The key of a fact at a layer is the input of the MLP's output projection at the subject's last token, averaged
over context templates: the bare prompt counts half, the templates with a text in front share the other half.
A subject at the very start of a text has keys that are far from those it has further on (the first tokens
draw attention to themselves; Xiao et al. 2024, arXiv 2309.17453), and a mean of both is neither: with ``keys:
each`` every template's key is a row of its own, with the same shares as weights. Attention is causal, so
prompts run only up to the subject.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.data.requests import EditRequest
from easyedit_rls.errors import RequestError
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.staged import StagedRows
from easyedit_rls.model.subject import Row, tokenize_fact


@dataclass(frozen=True)
class Fact:
    """A request, tokenized.

    Attributes:
        request: what was asked for.
        rows: prompt and target in each template; the bare prompt is the first.
        statements: subject and target in short texts of their own, for the value alone.
        kl_prompt: "{subject} is a", whose next-token distribution at the subject should stay.
    """

    request: EditRequest
    rows: tuple[Row, ...]
    statements: tuple[Row, ...]
    kl_prompt: Row


# by the request's id (one made by hand may hold lists; its fact keeps it alive) and the templates
KnownFacts = dict[tuple[int, tuple[str, ...]], Fact]


def locate_facts(
    tok: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    templates: Sequence[str],
    statements: Sequence[str] = (),
    known: KnownFacts | None = None,
) -> list[Fact]:
    """Tokenize requests in every template.

    Args:
        tok: the model's tokenizer.
        requests: parsed requests.
        templates: texts to put before the prompt, besides the bare prompt; within the user's turn, where the
            request is a chat.
        statements: short texts with {} for the subject, to put the target behind.
        known: facts that were tokenized before with these statements; those that are new are added.

    Raises:
        RequestError: a subject or a target that the tokenizer can't represent; names the request.
    """
    known = {} if known is None else known
    keys = [(id(request), tuple(templates)) for request in requests]
    for index, (key, request) in enumerate(zip(keys, requests)):
        if key not in known:
            try:
                known[key] = _located(tok, request, templates, statements)
            except RequestError as exc:
                raise exc.at(index) from exc
    return [known[key] for key in keys]


def _located(
    tok: PreTrainedTokenizerBase, request: EditRequest, templates: Sequence[str], statements: Sequence[str]
) -> Fact:
    subject, after, target = request.subject, request.after, request.target
    rows = tuple(
        tokenize_fact(
            tok, text + request.before, subject, after, target, joint=request.joint, chat=request.chat
        )
        for text in ("", *templates)
    )
    cut = [text.split("{}") for text in statements]
    short = tuple(tokenize_fact(tok, front, subject, behind, target) for front, behind in cut)
    return Fact(request, rows, short, tokenize_fact(tok, "", subject, " is a"))


def refuse_unfit_facts(model: PreTrainedModel, tok: PreTrainedTokenizerBase, facts: Sequence[Fact]) -> None:
    """See that the model can take the rows of facts.

    Raises:
        RequestError: one is longer than the model's table of positions; names the request.
        ModelError: a token of one is none of the model's.
    """
    rows = [
        (number, row.ids)
        for number, fact in enumerate(facts)
        for row in (*fact.rows, *fact.statements, fact.kl_prompt)
    ]
    refuse_unfit(
        model,
        tok,
        [ids for _, ids in rows],
        [number for number, _ in rows],
        what="The prompt with its target and the text before it",
        cure="Shorten the prompt, or context_templates.",
    )


class LayerWalk:
    """The states of a batch's facts, layer after layer, as the layers below are edited for good.

    Nothing is run twice without need: going on to a layer starts from the states below it, which no later
    edit changes.

    Args:
        model: the model.
        layout: its modules.
        facts: tokenized facts.
        batch_tokens: tokens in one pass, at most.
        keys: 'mean' over a fact's templates, or 'each' template's.

    Attributes:
        importance: of the rows in the objective, (facts,), or with 'each' (facts, templates): every fact's
            own, shared out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        facts: Sequence[Fact],
        batch_tokens: int,
        keys: str = "mean",
    ) -> None:
        self._layout, self._n_templates, self._keys = layout, len(facts[0].rows), keys
        self.importance = torch.tensor([fact.request.importance for fact in facts])
        if keys == "each":
            self.importance = self.importance[:, None] * _shares(self._n_templates)
        rows = [row.ids[: row.place + 1] for fact in facts for row in fact.rows]
        self._all = StagedRows(model, layout, rows, batch_tokens)
        self._bare = StagedRows(model, layout, rows[:: self._n_templates], batch_tokens)

    def advance_to(self, layer: int) -> Tensor:
        """Go up to a layer; its keys, (facts, d_k), or with 'each' (facts, templates, d_k), float32.

        From here on, the layers below it must not change any more.
        """
        states = self._all.last_states(self._layout.edited[layer].module, True, layer)
        states = states.reshape(-1, self._n_templates, states.shape[-1])
        if self._keys == "each":
            return states
        return states[:, 0] if self._n_templates == 1 else 0.5 * states[:, 0] + 0.5 * states[:, 1:].mean(1)

    def value_states(self, layer: int) -> Tensor:
        """Hidden states h at the value layer, subject's last token, bare prompt: (facts, d), float32.

        Args:
            layer: from here on, the layers below this one must not change any more.
        """
        return self._bare.last_states(self._layout.value_layer, False, layer)

    def value_states_now(self) -> Tensor:
        """The same once all edited layers are written."""
        return self.value_states(max(self._layout.edited))

    def layer_states(self, layer: int) -> Tensor:
        """Hidden states that this layer passes on, as `value_states`: (facts, d), float32."""
        return self._bare.last_states(self._layout.layers[layer], False, layer)

    def needed(self, layer: int, change: Tensor, output: Tensor | None = None) -> Tensor:
        """The change of the projection's output that a change of the layer's output asks for, (facts, d),
        float32.

        Args:
            layer: see `value_states`.
            change: of the layer's output, (facts, d).
            output: what the projection would write if all came to the layer as planned, (facts, d), to start
                the search from; None starts from what it writes now.
        """
        residual = self._layout.residuals[layer]
        if residual.norm is None:
            return residual.needed(change, None)
        planned = None
        if output is not None:
            planned = output - self._bare.last_states(self._layout.edited[layer].module, False, layer)
        return residual.needed(change, self._bare.last_states(residual.norm, True, layer), planned)


def _shares(n_templates: int) -> Tensor:
    """Each template's share of a fact, (templates,):
    half for the bare prompt, the other half for the others.
    """
    if n_templates == 1:
        return torch.ones(1)
    return torch.tensor([0.5] + [0.5 / (n_templates - 1)] * (n_templates - 1))


def collect_keys(
    model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], layer: int, batch_tokens: int
) -> Tensor:
    """Keys of facts at one layer, with the weights as they are now: (facts, d_k), float32."""
    return LayerWalk(model, layout, facts, batch_tokens).advance_to(layer)


def value_states(model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], batch_tokens: int) -> Tensor:
    """Hidden states h at the value layer with the weights as they are now: (facts, d), float32."""
    return LayerWalk(model, layout, facts, batch_tokens).value_states(0)
