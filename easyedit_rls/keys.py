"""Keys: where a fact sits (MEMIT, Meng et al. 2023, section 4).

The key of a fact at a layer is the input of the MLP's output projection at the subject's last token, averaged over context
templates: the bare prompt counts half, the templates with a text in front share the other half. Attention is causal, so prompts
run only up to the subject.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.errors import RequestError
from easyedit_rls.model.capture import tap
from easyedit_rls.model.forward import chunks, device_of, pad, run
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.subject import Row, tokenize_fact
from easyedit_rls.requests import EditRequest


@dataclass(frozen=True)
class Fact:
    """A request, tokenised.

    Attributes:
        request: what was asked for.
        rows: prompt and target in each template; the bare prompt is the first.
        essence: "{subject} is a", whose next-token distribution at the subject should stay.
    """

    request: EditRequest
    rows: tuple[Row, ...]
    essence: Row


def locate_facts(tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest], templates: Sequence[str]) -> list[Fact]:
    """Tokenise requests in every template.

    Args:
        tok: the model's tokenizer.
        requests: parsed requests.
        templates: texts to put before the prompt, besides the bare prompt.

    Raises:
        RequestError: a subject or a target that the tokenizer can't represent; names the request.
    """
    facts = []
    for index, request in enumerate(requests):
        try:
            rows = tuple(
                tokenize_fact(tok, template + request.before, request.subject, request.after, request.target)
                for template in ("", *templates)
            )
            facts.append(Fact(request, rows, tokenize_fact(tok, "", request.subject, " is a")))
        except RequestError as exc:
            raise exc.at(index) from exc
    return facts


def collect_keys(model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], layer: int, batch_tokens: int) -> Tensor:
    """Keys of facts at one layer, with the weights as they are now.

    Args:
        model: the model, run up to that layer's output projection.
        layout: its modules.
        facts: tokenised facts.
        layer: an edited layer.
        batch_tokens: tokens in one pass, at most.

    Returns:
        K, (facts, d_k), float32.
    """
    n_templates = len(facts[0].rows)
    rows = [row.ids[: row.subject_last + 1] for fact in facts for row in fact.rows]
    states = _last_states(model, rows, layout.edited[layer].module, True, batch_tokens).reshape(len(facts), n_templates, -1)
    if n_templates == 1:
        return states[:, 0]
    return 0.5 * states[:, 0] + 0.5 * states[:, 1:].mean(1)


def value_states(model: PreTrainedModel, layout: Layout, facts: Sequence[Fact], batch_tokens: int) -> Tensor:
    """Hidden states h at the value layer, subject's last token, bare prompt: (facts, d), float32."""
    rows = [fact.rows[0].ids[: fact.rows[0].subject_last + 1] for fact in facts]
    return _last_states(model, rows, layout.value_layer, False, batch_tokens)


def _last_states(model: PreTrainedModel, rows: Sequence[Sequence[int]], module: nn.Module, is_input: bool, batch_tokens: int) -> Tensor:
    """Input or output of a module at each row's last token, (rows, width), float32."""
    found: list[Tensor | None] = [None] * len(rows)
    wanted = {"inputs" if is_input else "outputs": {"state": module}}
    for group in chunks([len(row) for row in rows], batch_tokens):
        batch = pad([rows[i] for i in group], "left", device_of(model))
        with torch.no_grad(), tap(**wanted, stop=True) as seen:  # type: ignore[arg-type]
            run(model, batch)
        for i, state in zip(group, seen["state"][:, -1].float()):
            found[i] = state
    return torch.stack(found)  # type: ignore[arg-type]
