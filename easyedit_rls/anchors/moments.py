"""Second moments of keys, summed over text until more text no longer changes them.

The anchor term ``Σ ‖k (W − W_0)‖²`` shall keep what a layer passes on. Where a norm stands behind the MLP, a
change gets through divided by the length of what comes to the norm, x: a start token's is near zero in Gemma
3, and a change there is blown up a hundredfold. So keys are taken as ``k · m/‖x‖`` there, with m the
geometric mean of ‖x‖: then the term is, to first order, the change that comes out behind the norm.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from easyedit_rls._base.progress import progress_bar
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.model.batching import device_of, pack_batches, pad, pass_overhead, run
from easyedit_rls.model.hooks import tap, undisturbed
from easyedit_rls.model.layout import Layout

logger = logging.getLogger(__name__)

_N_PROBES = 16
_LEAST_LENGTH = 1e-12  # of what comes to a norm: padding tokens of some models give zeros


@dataclass(frozen=True)
class Moment:
    """Uncentred second moment of one layer's keys.

    Attributes:
        mean: E[k kᵀ], (d_k, d_k), on the CPU.
        n_tokens: tokens it was averaged over.
        error: estimated relative error, see `_Convergence`; NaN where it isn't known.
    """

    mean: Tensor
    n_tokens: int
    error: float = math.nan


def sum_moments(
    model: PreTrainedModel,
    layout: Layout,
    layers: Sequence[int],
    blocks: Iterable[Sequence[Sequence[int]]],
    hparams: RLSEditHyperParams,
    *,
    show_progress: bool | None = None,
) -> dict[int, Moment]:
    """Sum ``k kᵀ`` over the tokens of texts, at all layers in one pass, until the estimated error of each is
    below `mom2_tolerance`.

    Args:
        model: the model; run up to the last of the layers.
        layout: its modules.
        layers: which edited layers.
        blocks: texts as token ids, some at a time; convergence is looked at after each block.
        hparams: mom2_dtype (type of the sum), mom2_tolerance and batch_tokens.
        show_progress: None shows a bar on a terminal only.
    """
    modules = {layer: layout.edited[layer].module for layer in layers}
    norms = {layer: norm for layer in layers if (norm := layout.residuals[layer].norm) is not None}
    logs: dict[int, float] = dict.fromkeys(norms, 0.0)  # of the lengths of what comes to the norms, summed
    sums: dict[int, Tensor] = {}
    watches: dict[int, _Convergence] = {}
    n_tokens, error = 0, math.inf
    with undisturbed(model), progress_bar(None, "second moments", "tok", show_progress) as bar:
        for block in blocks:
            for keys_of_groups in _keys(model, modules, norms, block, hparams):
                for layer, (keys, length, half) in keys_of_groups.items():
                    if length is not None:
                        keys, logs[layer] = keys / length, logs[layer] + float(length.log().sum())
                    zeros = torch.zeros(keys.shape[1], keys.shape[1]).to(keys)
                    sums[layer] = sums.get(layer, zeros).addmm_(keys.T, keys)
                    watches.setdefault(layer, _Convergence(keys)).add(keys, half)
            n_tokens += sum(map(len, block))
            error = max(watch.error() for watch in watches.values())
            bar.update(sum(map(len, block)))
            bar.set_postfix_str(f"error {error:.3f}")
            if error < hparams.mom2_tolerance:
                break
    logger.info(
        "Second moments of %d tokens, relative error about %.3f (mom2_tolerance %g)",
        n_tokens,
        error,
        hparams.mom2_tolerance,
    )
    means = {layer: math.exp(total / n_tokens) for layer, total in logs.items()}
    return {
        layer: Moment(
            (total * (means.get(layer, 1.0) ** 2 / n_tokens)).cpu(), n_tokens, watches[layer].error()
        )
        for layer, total in sums.items()
    }


def _keys(
    model: PreTrainedModel,
    modules: Mapping[int, nn.Module],
    norms: Mapping[int, nn.Module],
    rows: Sequence[Sequence[int]],
    hparams: RLSEditHyperParams,
) -> Iterable[dict[int, tuple[Tensor, Tensor | None, Tensor]]]:
    """For groups of texts: layer -> keys of all tokens (tokens, d_k), the lengths of what comes to the norm
    behind the MLP where there is one, (tokens, 1), and which half of the texts each token belongs to,
    (tokens,).
    """
    dtype = getattr(torch, hparams.mom2_dtype)
    device = device_of(model)
    taps: dict[Any, nn.Module] = {**modules, **{("norm", layer): norm for layer, norm in norms.items()}}
    for group in pack_batches([len(row) for row in rows], hparams.batch_tokens, pass_overhead(device)):
        batch = pad([rows[i] for i in group], "right", device)
        with tap(inputs=taps, stop=True) as seen:
            run(model, batch)
        is_token = batch.mask.bool()
        half = (torch.tensor(group, device=is_token.device) % 2)[:, None].expand_as(is_token)[is_token]
        # some models flatten rows and tokens
        real = {
            key: states.reshape(*is_token.shape, -1)[is_token.to(states.device)].to(dtype)
            for key, states in seen.items()
        }
        lengths = {
            layer: real["norm", layer].norm(dim=1, keepdim=True).clamp(min=_LEAST_LENGTH) for layer in norms
        }
        yield {layer: (real[layer], lengths.get(layer), half.to(real[layer].device)) for layer in modules}


class _Convergence:
    """How far a mean of ``k kᵀ`` still is from what endless text would give, without a second matrix of its
    size.

    Even and odd texts give two independent means A and B; the error of their mean is distributed as (A −
    B)/2. Its size against the mean's own is measured in Frobenius norm by random probes Z (Hutchinson 1990),
    with every coordinate scaled to variance one, so that a few large coordinates don't hide the others: ``‖(A
    − B) Z‖ / ‖(A + B) Z‖``.
    """

    def __init__(self, keys: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (keys.shape[1], _N_PROBES), generator=generator).to(keys) * 2 - 1
        self._scale = keys.square().mean(0).clamp(min=1e-12).rsqrt()[:, None]
        self._probes = signs * self._scale
        self._sums = [torch.zeros_like(signs) for _ in range(2)]
        self._counts = [0, 0]

    def add(self, keys: Tensor, half: Tensor) -> None:
        for number in range(2):
            some = keys[half == number]
            self._sums[number] += some.T @ (some @ self._probes)
            self._counts[number] += len(some)

    def error(self) -> float:
        if min(self._counts) == 0:
            return math.inf
        A, B = (self._scale * total / count for total, count in zip(self._sums, self._counts))
        return float((A - B).norm() / (A + B).norm())
