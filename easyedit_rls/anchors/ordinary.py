"""Keys of ordinary tokens: what the gate's threshold is taken from."""

from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.text import token_blocks
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.model.batching import device_of, pack_batches, pad, pass_overhead, run
from easyedit_rls.model.hooks import tap, undisturbed
from easyedit_rls.model.layout import Layout
from easyedit_rls.model.tokens import start_tokens

N_KEYS = 32_768  # at most


def ordinary_keys(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    layout: Layout,
    layer: int,
    hparams: RLSEditHyperParams,
) -> Tensor:
    """Keys of the tokens of the text that ships with the package, start tokens left out, (n, d_k), in the
    model's type.

    Args:
        model: the model; what lies below the layer is unedited.
        tok: its tokenizer.
        layout: its modules.
        layer: an edited one.
        hparams: seed, batch_tokens.
    """
    module, device, n_start = layout.edited[layer].module, device_of(model), len(start_tokens(tok))
    rows = list(chain.from_iterable(token_blocks(model, tok, replace(hparams, mom2_dataset="shipped"))))
    found, n = [], 0
    with undisturbed(model):
        for group in pack_batches([len(row) for row in rows], hparams.batch_tokens, pass_overhead(device)):
            batch = pad([rows[i] for i in group], "right", device)
            with tap(inputs={layer: module}, stop=True) as seen:
                run(model, batch)
            is_ordinary = batch.mask.bool()
            is_ordinary[:, :n_start] = False
            keys = seen[layer].reshape(*is_ordinary.shape, -1)[is_ordinary.to(seen[layer].device)]
            found.append(keys.detach())
            n += len(keys)
            if n >= N_KEYS:
                break
    return torch.cat(found)[:N_KEYS]
