"""Edited weights in one orientation (d_k × d_v), and the model's fingerprint."""

import hashlib
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from easyedit_rls.errors import LayoutError, NumericalError
from easyedit_rls.model.gate import is_behind_gate

_SAMPLES = 4096  # values of each parameter that go into the fingerprint


class EditedWeight:
    """Border between a module's own weight and the package's orientation, ``output = key @ W``.

    ``nn.Linear`` stores Wᵀ, GPT-2's ``Conv1D`` stores W; which one is told by the module's type, never by its
    shape.

    Args:
        module: the MLP's output projection.
        name: full name of the module in the model.

    Raises:
        LayoutError: another type of module, or a quantized weight.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise LayoutError(
                f"Module {name} is a {type(module).__name__}; only Linear and Conv1D can be edited. "
                "Check rewrite_module_tmp."
            )
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise LayoutError(
                f"Weight {name}.weight is no parameter of its own but computed from other weights "
                "before each pass "
                "(a parametrization, weight_norm, spectral_norm or prune): what is written there is lost. "
                "Make it permanent first "
                "(remove_parametrizations, remove_weight_norm, remove_spectral_norm, prune.remove)."
            )
        if not module.weight.is_floating_point() or module.weight.dim() != 2:
            raise LayoutError(
                f"Weight {name}.weight is quantized ({module.weight.dtype}). "
                "Load the model in float32, bfloat16 or float16."
            )
        self.module = module
        self.parameter_name = f"{name}.weight"
        self._is_transposed = isinstance(module, nn.Linear)

    @property
    def live_name(self) -> str:
        """Full name of the parameter that edits are written to."""
        return self.parameter_name

    @property
    def parameter(self) -> Tensor:
        """The live parameter, in the module's own orientation."""
        return self.module.weight

    @property
    def shape(self) -> tuple[int, int]:
        """(d_k, d_v)."""
        rows, columns = self.parameter.shape
        return (columns, rows) if self._is_transposed else (rows, columns)

    def read(self) -> Tensor:
        """A float32 copy, (d_k, d_v)."""
        return self.oriented().to(torch.float32, copy=True).contiguous()

    def oriented(self) -> Tensor:
        """A view of the parameter as (d_k, d_v), in its own dtype."""
        weight = self.parameter.detach()
        return weight.T if self._is_transposed else weight

    def write(self, W: Tensor) -> None:
        """Round W, (d_k, d_v), to the parameter's dtype and write it in place."""
        with torch.no_grad():
            self.parameter.copy_(W.T if self._is_transposed else W)

    def holds(self, W: Tensor) -> bool:
        """Whether the parameter is exactly W, (d_k, d_v), rounded to its dtype."""
        return torch.equal(self.oriented(), W.to(self.parameter.dtype))

    def snapshot(self) -> Tensor:
        """A copy of the parameter as it is, for `restore`."""
        return self.parameter.detach().clone()

    def restore(self, snapshot: Tensor) -> None:
        """Write a snapshot back, bit for bit."""
        with torch.no_grad():
            self.parameter.copy_(snapshot)


def shared_with(model: nn.Module, weight: EditedWeight) -> str | None:
    """Another name of the model's for an edited parameter, or for one that lies in the same memory; None if
    it stands alone.
    """
    start, end = _range(weight.parameter)
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in module._parameters.items():
            full = f"{path}.{name}"
            if tensor is None or full == weight.parameter_name:
                continue
            other_start, other_end = _range(tensor)
            if tensor is weight.parameter or (
                tensor.device == weight.parameter.device and other_start < end and start < other_end
            ):
                return full
    return None


def refuse_unsound(model: nn.Module) -> None:
    """See that a model's weights are there, and finite.

    Raises:
        LayoutError: one is offloaded.
        NumericalError: one holds NaN or infinity.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise LayoutError(
                f"Weight {name} is offloaded: it can't be edited, nor run fast. "
                "Load the model onto devices that hold it whole."
            )
        if not bool(torch.isfinite(parameter).all()):
            raise NumericalError(
                f"Weight {name} holds NaN or infinite entries. Load the model again from sound weights."
            )


def _range(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one; an empty range where there is no memory (meta
    device).
    """
    start = 0 if tensor.device.type == "meta" else tensor.data_ptr()
    return start, start + (tensor.numel() * tensor.element_size() if start else 0)


def fingerprint(model: nn.Module, leave_out: Collection[str] = ()) -> str:
    """SHA-256 over names, shapes, dtypes and evenly spaced values of all parameters, as 16 hex digits.

    Up to 4,096 values a parameter are read: an edit changes all of a weight, so it can't hide between them,
    and a model of billions of parameters takes a moment.

    Args:
        model: any module.
        leave_out: names of parameters that don't count.
    """
    return _digest(
        (name, parameter)
        for name, parameter in sorted(model.named_parameters())
        if name not in leave_out and not is_behind_gate(name)
    )


def weights_fingerprint(weights: Mapping[int, Tensor]) -> str:
    """The same over edited weights, layer -> (d_k, d_v), in the model's dtype."""
    return _digest((str(layer), weight) for layer, weight in sorted(weights.items()))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors:
        step = max(1, tensor.numel() // _SAMPLES)
        places = torch.arange(0, tensor.numel(), step, device=tensor.device)[
            :_SAMPLES
        ]  # without a copy of a transposed weight
        values = tensor.detach()[torch.unravel_index(places, tensor.shape)].to("cpu", torch.float64)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:16]
