"""From what an MLP writes to what its layer passes on.

In most decoders the output of the MLP's projection is added to the residual stream as it is. In some it is
scaled on the way (Granite), or a norm stands behind it (Gemma 2 and 3, OLMo 2, GLM-4; OPT-350m norms the
sum). There a wanted change of the layer's output asks for another change of the projection's. Which of these
a layer is, is seen in a pass of a few tokens, not told by its family.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from easyedit_rls.errors import LayoutError
from easyedit_rls.model.hooks import tap

_TOKENS = (1, 2, 3, 4)
_STEPS = 5  # of `Residual.needed`
_ROUNDING = 0.03  # relative; bfloat16 has 8 bits


@dataclass(frozen=True)
class Residual:
    """How a layer's output u follows its projection's x, token by token: u = a + scale · x, or norm(a + scale
    · x).

    Attributes:
        scale: factor of x, 1 in most decoders.
        norm: the norm behind, if there is one.
    """

    scale: float
    norm: nn.Module | None

    def needed(self, change: Tensor, before_norm: Tensor | None, planned: Tensor | None = None) -> Tensor:
        """The change of the projection's output that changes the layer's output as wanted, (facts, d) ->
        (facts, d).

        A norm y = g · (u − m)/s + b fixes the length of what it lets through, so not every change can be had.
        A few damped Gauss-Newton steps from the planned one (Levenberg 1944) come near: u moves by s · g ·
        (what is missing)/(g² + ε), with ε the median of g², so that directions that hardly get through are
        left as planned. What stays missing, the layers above see and take on.

        Args:
            change: of the layer's output.
            before_norm: the norm's input now, (facts, d); None without one.
            planned: change of the projection's output to start from, (facts, d); None starts from none.
        """
        norm = self.norm
        if norm is None or before_norm is None:
            return change / self.scale
        weight = next(norm.parameters(), None)
        dtype = before_norm.dtype if weight is None else weight.dtype
        gain = _gain(norm, before_norm.to(dtype))

        def passed(u: Tensor) -> Tensor:
            behind: Tensor = norm(u.to(dtype))
            return behind.float()

        now, u = passed(before_norm), before_norm.float()
        u = u if planned is None else u + self.scale * planned
        spread = u.std(1, unbiased=False, keepdim=True)
        step = spread * gain / (gain.square() + gain.square().median())
        for _ in range(_STEPS):
            u = u + step * (change - (passed(u) - now))
        return (u - before_norm.float()) / self.scale


def _gain(norm: nn.Module, like: Tensor) -> Tensor:
    """Gain of a norm, (d,), seen on inputs whose mean is 0 and whose spread is 1."""
    signs = torch.ones_like(like[0])
    signs[::2] = -1.0
    bias: Tensor = norm(torch.zeros_like(like[:1]))[0].float()
    standard: Tensor = norm(signs[None])[0].float()
    return (standard - bias) * signs.float()


def find_residual(model: PreTrainedModel, layer: nn.Module, projection: nn.Module, name: str) -> Residual:
    """See how a layer's output follows its projection's.

    Args:
        model: the model.
        layer: the decoder layer.
        projection: its MLP's output projection.
        name: of the projection, for the message.

    Raises:
        LayoutError: something else than a factor and a norm stands between.
    """
    tokens = torch.tensor([_TOKENS], device=model.get_input_embeddings().weight.device)
    norm = _norm_behind(model, layer, projection, tokens)
    ends = {"inputs": {"end": norm}} if norm is not None else {"outputs": {"end": layer}}

    def end(push: Tensor | None) -> tuple[Tensor, Tensor]:
        edit = {
            projection: lambda output: (
                output if push is None else output + push.to(output).reshape(output.shape)
            )
        }
        with (
            torch.no_grad(),
            tap(
                edit=edit,
                stop=True,
                inputs=ends.get("inputs"),
                outputs={**ends.get("outputs", {}), "x": projection},
            ) as seen,
        ):
            model(input_ids=tokens, use_cache=False)
        return seen["end"].float().reshape(len(_TOKENS), -1), seen["x"].float().reshape(len(_TOKENS), -1)

    still, x = end(None)
    generator = torch.Generator().manual_seed(0)
    push = torch.randn(x.shape, generator=generator).to(x) * (still.norm() + x.norm()) / x.numel() ** 0.5
    change = end(push)[0] - still
    scale = float((change * push).sum() / push.square().sum())
    if float((change - scale * push).norm()) > 2 * _ROUNDING * float(change.norm()) or scale == 0:
        raise LayoutError(
            f"What {name} writes does not reach its layer's output as it is, scaled, or through a norm; "
            "it can't be edited."
        )
    return Residual(
        1.0 if abs(scale - 1) < _ROUNDING else float(f"{scale:.3g}"), norm
    )  # rounded: it is the same whatever was edited


def _norm_behind(
    model: PreTrainedModel, layer: nn.Module, projection: nn.Module, tokens: Tensor
) -> nn.Module | None:
    """The norm of the layer that runs after the projection."""
    order: list[nn.Module] = []
    norms = [module for module in layer.modules() if "norm" in type(module).__name__.lower()]
    handles = [
        module.register_forward_hook(lambda m, args, output: order.append(m))
        for module in [projection, *norms]
    ]
    try:
        with torch.no_grad(), tap(outputs={"end": layer}, stop=True):
            model(input_ids=tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    behind = order[order.index(projection) + 1 :]
    return behind[-1] if behind else None
