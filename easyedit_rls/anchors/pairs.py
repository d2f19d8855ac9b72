"""Explicit anchors: pairs of keys and what they shall go on mapping to."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.arguments import listed, text
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import AnchorError, RequestError
from easyedit_rls.model.batching import device_of, pad, run
from easyedit_rls.model.hooks import tap, undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.tokens import encode_all


@dataclass(frozen=True)
class AnchorPairs:
    """Explicit anchors (K_0, V_0) of the paper, by layer.

    Attributes:
        keys: layer -> K_0, (anchors, d_k).
        values: layer -> V_0, (anchors, d_v); a layer that is missing keeps what it says now, V_0 = K_0 W_0.
    """

    keys: dict[int, Tensor]
    values: dict[int, Tensor]


def anchor_pairs(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: RLSEditHyperParams, prompts: Sequence[str]
) -> AnchorPairs:
    """Explicit anchors from prompts whose outcome should stay: the keys of all their tokens, with what they
    map to now.

    Args:
        model: the unedited model.
        tok: its tokenizer.
        hparams: layers and module names.
        prompts: texts to keep.

    Raises:
        ArgumentError: one prompt was given instead of a list.
        AnchorError: no prompt, or one that is empty or longer than the model's table of positions.
        ModelError: a token is none of the model's.
    """
    given = [text(prompt, "An item of prompts") for prompt in listed(prompts, "prompts")]
    rows = [encoded.ids for encoded in encode_all(tok, given)]
    if not rows or not all(rows):
        raise AnchorError(
            "Anchor prompts are missing or empty. Give at least one text, and none without tokens."
        )
    try:
        refuse_unfit(model, tok, rows, n_new=1)
    except RequestError as exc:
        raise AnchorError(f"Anchor prompt {exc.index}: {exc.problem}") from exc
    layout = find_layout(model, hparams)
    keys: dict[int, list[Tensor]] = {layer: [] for layer in layout.edited}
    with undisturbed(model):
        for row in rows:
            with tap(
                inputs={layer: weight.module for layer, weight in layout.edited.items()}, stop=True
            ) as seen:
                run(model, pad([row], "right", device_of(model)))
            for layer, inputs in seen.items():
                keys[layer].append(inputs.reshape(len(row), -1).float())
    return AnchorPairs(keys={layer: torch.cat(parts) for layer, parts in keys.items()}, values={})
