"""Teacher-forced scores of answers, batched: the one forward pass behind all metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.model.capture import undisturbed
from easyedit_rls.model.forward import chunks, device_of, pad, run
from easyedit_rls.model.subject import tokenize_answer
from easyedit_rls.progress import progress_bar
from easyedit_rls.requests import Probe


@dataclass(frozen=True)
class Score:
    """How a model rates one answer.

    Attributes:
        nll: mean negative log-likelihood of its tokens, nats.
        is_argmax: whether each of its tokens is the most probable one, given those before it.
    """

    nll: float
    is_argmax: bool


def score(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    probes: Sequence[Probe],
    *,
    batch_tokens: int = 8192,
    desc: str = "scoring",
    show_progress: bool | None = None,
) -> list[Score]:
    """Score each probe's answer behind its prompt.

    Args:
        model: the model; logits are computed where an answer stands only.
        tok: its tokenizer.
        probes: prompts with answers.
        batch_tokens: tokens in one pass, at most.
        desc: label of the progress bar.
        show_progress: None shows a bar on a terminal only.

    Returns:
        A score each probe, in order.
    """
    rows = [tokenize_answer(tok, probe.prompt, probe.answer) for probe in probes]
    scores: list[Score | None] = [None] * len(rows)
    head = model.get_output_embeddings()
    with undisturbed(model), progress_bar(len(rows), desc, "text", show_progress) as bar:
        for group in chunks([len(row.ids) for row in rows], batch_tokens):
            places = [
                (r, row.target_start - 1 + j, token) for r, i in enumerate(group) for row in [rows[i]] for j, token in enumerate(row.target)
            ]
            where, at, tokens = (torch.tensor(column, device=device_of(model)) for column in zip(*places))
            hook = head.register_forward_pre_hook(lambda _, args, w=where, a=at: (args[0][w, a][None],))
            try:
                logits = run(model, pad([rows[i].ids[:-1] for i in group], "right", device_of(model))).logits[0].float()
            finally:
                hook.remove()
            nll = torch.nn.functional.cross_entropy(logits, tokens, reduction="none").cpu()
            is_top = (logits.argmax(1) == tokens).cpu()
            start = 0
            for i in group:
                end = start + len(rows[i].target)
                scores[i] = Score(float(nll[start:end].mean()), bool(is_top[start:end].all()))
                start = end
            bar.update(len(group))
    return scores  # type: ignore[return-value]
