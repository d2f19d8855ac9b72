"""Target outputs V_t: what an edited layer's projection shall write for the keys of a batch.

The solver fits ``K_t W ≈ V_t`` (arXiv 2601.15686, eq. 7); the setting `targets` says what V_t is. Let L
layers be edited, l the i-th of them (from 0), those below it written; z is the value and h the hidden state
now, both at the last edited layer, z_l and h_l the same at layer l, all at the subject's last token:

    residual       V_t = K_t W_{t−1} + (z − h)/(L − i)                      MEMIT, arXiv 2210.07229, eq. 20
    published      V_t = K_t W_{t−1} + ((z − h) − K_t W_{t−1})/(L − i)      2601.15686, as its code has it
    first_layer    V_t = K_t W_{t−1} + (z_l − h_l)                          MEMIT-FE, arXiv 2605.00358

The published one takes the residual itself, V_t = z − h, for the output, so that the old output is lost. With
first_layer z is optimized at the first edited layer, and z_l is what layer l makes of it. Where a factor or a
norm stands behind the projection, another change of its output makes the wanted one of the layer's: `needed`.
"""

from collections.abc import Callable

from torch import Tensor

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.facts.keys import LayerWalk
from easyedit_rls.facts.values import Values

Needed = Callable[[Tensor], Tensor]  # from a change of the layer's output to one of the projection's


def residual(output: Tensor, missing: Tensor, layers_left: int, needed: Needed) -> Tensor:
    """``V = K W + (z − h)/(L − i)``: the old output, and this layer's share of what is missing."""
    return output + needed(missing / layers_left)


def published(output: Tensor, missing: Tensor, layers_left: int, needed: Needed) -> Tensor:
    """``V = z − h``; what that leaves, after the old output is subtracted, is shared out."""
    return output + needed(missing / layers_left) - output / layers_left


def first_layer(output: Tensor, missing: Tensor, layers_left: int, needed: Needed) -> Tensor:
    """``V = K W + (z_l − h_l)``: a goal of the layer's own, so nothing is shared out."""
    return output + needed(missing)


RULES = {"residual": residual, "published": published, "first_layer": first_layer}


def target_outputs(
    K: Tensor, W: Tensor, walk: LayerWalk, values: Values, layer: int, hparams: RLSEditHyperParams
) -> Tensor:
    """Target outputs of one layer, (facts, d_v), or (facts, templates, d_v) where K has rows for each.

    Args:
        K: keys, (facts, d_k) or (facts, templates, d_k).
        W: the layer's weight before this batch, (d_k, d_v).
        walk: has advanced to this layer.
        values: of the batch; where they have a goal for each layer, first_layer's rule holds.
        layer: its number.
        hparams: layers, targets.
    """
    goal = None if values.goals is None else values.goals[layer]
    z, h = (values.z, walk.value_states(layer)) if goal is None else (goal.state, walk.layer_states(layer))

    def needed(change: Tensor) -> Tensor:
        found = walk.needed(layer, change, None if goal is None else goal.output).to(W)
        return found if K.dim() == 2 else found[:, None]  # a fact's rows all change alike

    rule = first_layer if goal is not None else RULES[hparams.targets]
    layers_left = len(hparams.layers) - hparams.layers.index(layer)
    return rule(K.to(W) @ W, z - h, layers_left, needed).to(K)
