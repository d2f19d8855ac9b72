"""A model's parameters in another type: cast once, then brought up to date before each use."""

import weakref
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_SAMPLES = 256  # values of each parameter that are looked at


@dataclass(frozen=True)
class _Cast:
    """One parameter's cast, and what the parameter was like then.

    Attributes:
        source: the parameter; weak, so that one that was replaced is let go.
        parameter: the cast, of the source's shape and strides, on its device.
        mark: see `_mark`.
        sample: see `_sample`.
    """

    source: "weakref.ref[nn.Parameter]"
    parameter: nn.Parameter
    mark: tuple[Any, ...] | None
    sample: Tensor


class CastParameters:
    """Casts of a model's parameters, bit for bit those that a fresh cast gives.

    A parameter is cast again where torch's count of the writes to it has moved on, where it lies elsewhere,
    or where one of its sampled values (256 or more, evenly spaced) is another one. The count alone is not
    enough: it misses what is written through ``parameter.data``, as PEFT's merging and ``Module.to`` do.
    Parameters that are known to be edited are cast again each time. What goes unseen is a write that torch
    does not count to a few values of a parameter that is not edited; `clear` helps there.

    A deep copy starts without casts, since its model has parameters of its own; so does an unpickled one.
    """

    def __init__(self) -> None:
        self._dtype: torch.dtype | None = None
        self._casts: dict[int, _Cast] = {}

    def __reduce__(self) -> tuple[type["CastParameters"], tuple[()]]:
        return CastParameters, ()

    def clear(self) -> None:
        """Free the casts; the next use makes them anew."""
        self._casts = {}

    def updated(
        self, parameters: Iterable[nn.Parameter], dtype: torch.dtype, edited: Collection[Tensor]
    ) -> dict[int, nn.Parameter]:
        """The casts as of now. They are good until the next call, which writes into the same memory.

        Args:
            parameters: of the model, each once, floating-point ones.
            dtype: of the casts; those in another type are freed.
            edited: those of the parameters that the editor writes to.

        Returns:
            id of a parameter -> its cast, without gradient.
        """
        before = self._casts if dtype == self._dtype else {}
        self._casts, self._dtype = {}, dtype  # what fails on the way is cast anew
        is_edited = {id(parameter) for parameter in edited}
        with torch.inference_mode(False), torch.no_grad():
            for parameter in parameters:
                found = before.pop(id(parameter), None)
                if found is None or not _fits(found, parameter):
                    found = None  # its memory first
                    found = _cast(parameter, dtype)
                elif id(parameter) in is_edited or not _is_current(found, parameter):
                    found = _cast(parameter, dtype, into=found.parameter)
                self._casts[id(parameter)] = found
        return {key: found.parameter for key, found in self._casts.items()}


def _cast(parameter: nn.Parameter, dtype: torch.dtype, into: nn.Parameter | None = None) -> _Cast:
    """A parameter in another type, in new memory, or in that of its last cast."""
    if into is None:
        into = nn.Parameter(parameter.detach().to(dtype, copy=True), requires_grad=False)
    else:
        into.copy_(parameter.detach())
    return _Cast(weakref.ref(parameter), into, _mark(parameter), _sample(parameter).clone())


def _fits(found: _Cast, parameter: nn.Parameter) -> bool:
    """Whether it is that parameter's, and a new cast would have the same device, shape and strides."""
    ours, theirs = ((tensor.device, tensor.shape, tensor.stride()) for tensor in (found.parameter, parameter))
    return found.source() is parameter and ours == theirs


def _is_current(found: _Cast, parameter: nn.Parameter) -> bool:
    """Whether a parameter is what it was when it was cast."""
    mark = _mark(parameter)
    return mark is not None and found.mark == mark and torch.equal(found.sample, _sample(parameter))


def _mark(parameter: nn.Parameter) -> tuple[Any, ...] | None:
    """What changes with the memory, and with each write that torch counts; None where it counts none."""
    return None if parameter.is_inference() else (parameter.dtype, parameter.data_ptr(), parameter._version)


def _sample(parameter: nn.Parameter) -> Tensor:
    """Evenly spaced values of a parameter in its own type, (n,): all, or 256 to 511; a view if it can be."""
    return parameter.detach().flatten()[:: max(1, parameter.numel() // _SAMPLES)]
