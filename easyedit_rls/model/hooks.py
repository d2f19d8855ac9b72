"""Hooks that see and change hidden states, always removed again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _StopForward(Exception):
    """Raised by a hook to end a forward pass whose rest nobody needs."""


@contextmanager
def tap(
    *,
    inputs: Mapping[Any, nn.Module] | None = None,
    outputs: Mapping[Any, nn.Module] | None = None,
    edit: Mapping[nn.Module, Callable[[Tensor], Tensor]] | None = None,
    stop: bool = False,
) -> Iterator[dict[Any, Tensor]]:
    """See the inputs and outputs of modules during the forward passes run inside the block.

    Args:
        inputs: key -> module whose first positional input is wanted.
        outputs: key -> module whose output is wanted (its first element, where it is a tuple).
        edit: module -> function that maps its output to the one the model goes on with; runs before `outputs`
            sees it.
        stop: end the pass as soon as every wanted tensor has been seen, skipping the rest of the block.

    Yields:
        key -> tensor of the last pass, not detached.
    """
    inputs, outputs, edit = inputs or {}, outputs or {}, edit or {}
    seen: dict[Any, Tensor] = {}
    handles = []

    def keep(key: Any, tensor: Tensor) -> None:
        seen[key] = tensor
        if stop and len(seen) == len(inputs) + len(outputs):
            raise _StopForward

    def on_input(key: Any) -> Callable[..., None]:
        return lambda module, args: keep(key, args[0])

    def on_output(key: Any) -> Callable[..., None]:
        return lambda module, args, output: keep(key, hidden_of(output))

    def on_edit(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        return lambda module, args, output: _with_hidden(output, change(hidden_of(output)))

    try:
        for module, change in edit.items():
            handles.append(module.register_forward_hook(on_edit(change)))
        for key, module in outputs.items():
            handles.append(module.register_forward_hook(on_output(key)))
        for key, module in inputs.items():
            handles.append(module.register_forward_pre_hook(on_input(key)))
        yield seen
    except _StopForward:
        pass
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients to parameters, no autograd; every flag is put back, and after an
    exception every hook too.

    What is hung onto modules inside takes itself off again, but an interrupt can come in the middle of that.
    """
    found = _Found(model)
    try:
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.no_grad():
            yield
        found.put_flags_back()
    except BaseException:
        found.put_flags_back()
        found.put_hooks_back()
        raise


class _Found:
    """Flags and hooks of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [
            (module, module.training, module.__dict__.get("forward")) for module in model.modules()
        ]
        self._wants_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._hooks = [
            (hooks, dict(hooks))
            for module, _, _ in self._modules
            for name, hooks in module.__dict__.items()
            if name.startswith(("_forward_hooks", "_forward_pre_hooks"))
        ]

    def put_flags_back(self) -> None:
        for module, is_training, _ in self._modules:
            module.training = is_training
        for parameter, flag in self._wants_grad:
            parameter.requires_grad_(flag)

    def put_hooks_back(self) -> None:
        for hooks, before in self._hooks:
            if hooks.keys() != before.keys():
                hooks.clear()
                hooks.update(before)
        for module, _, forward in self._modules:
            if module.__dict__.get("forward") is not forward:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward


@contextmanager
def record_outputs(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """Note down what layers return, whole, during one forward pass inside the block; yields a list in the
    layers' order.
    """
    found: list[Any] = [None] * len(layers)
    handles = []

    def on_output(i: int) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            found[i] = output

        return keep

    try:
        handles = [layer.register_forward_hook(on_output(i)) for i, layer in enumerate(layers)]
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skip_layers(layers: Sequence[nn.Module], forms: Sequence[Any], hidden: Tensor | None) -> Iterator[None]:
    """Forward passes inside the block don't run these layers, the model's first ones; the next layer gets
    `hidden`.

    Args:
        layers: decoder layers from the first on; none changes nothing.
        forms: `form_of` what each returned before.
        hidden: hidden states that the last of them shall return, (rows, length, d).
    """
    replaced = [(layer, layer.__dict__.get("forward")) for layer in layers]

    def instead(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
        return lambda *args, **kwargs: hidden if rest is None else (hidden, *rest)

    try:
        for layer, rest in zip(layers, forms, strict=True):
            layer.__dict__["forward"] = instead(rest)
        yield
    finally:
        for layer, own in replaced:
            if own is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = own


def form_of(output: Any) -> tuple[Any, ...] | None:
    """What a layer returned beside its hidden states, None where it returns them alone."""
    return output[1:] if isinstance(output, tuple) else None


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a layer returned."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
