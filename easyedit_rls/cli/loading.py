"""How commands load a model, and how those without hydra end."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.cli.console import visible
from easyedit_rls.errors import InputError, LayoutError, RLSEditError
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.model.layout import find_layout

_CURE = "Give a folder that save_pretrained wrote, or a hub name; `easyedit-rls demo-model` writes one to try things on."


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in evaluation mode, and its tokenizer.

    Args:
        name: folder or hub name.
        dtype: float32, bfloat16 or float16.
        device: where the model goes; see `choose_device`.

    Raises:
        LayoutError: there is no such model.
    """
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():  # not a hub name, so don't go looking there
        raise LayoutError(f"There is no folder {Path(name).expanduser().absolute()}. {_CURE}")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, dtype)).to(device).eval()
        return model, AutoTokenizer.from_pretrained(name)
    except OSError as exc:
        first = str(exc).splitlines()[0]
        raise LayoutError(f"No model can be loaded from {name}: {first} {_CURE}") from exc


def settings_for(model: PreTrainedModel, name: str, hparams: str | None, changes: Mapping[str, Any] | None = None) -> RLSEditHyperParams:
    """Settings by file or shipped name; made from the model where none are given.

    Args:
        model: what they shall fit.
        name: its folder or hub name.
        hparams: a file or a shipped name; None makes them from the model.
        changes: settings that shall differ.

    Raises:
        HyperParamsError: the file can't be read, or a value is out of range.
        LayoutError: the settings are another model's; names the file and every difference.
    """
    changes = changes or {}
    if hparams is None:
        return RLSEditHyperParams.for_model(model, **{"model_name": name, **changes})
    given = RLSEditHyperParams.from_dict({**RLSEditHyperParams.from_hparams(hparams).to_dict(), **changes}, source=hparams)
    try:
        find_layout(model, given)
    except LayoutError as exc:
        raise LayoutError(f"{hparams}, for {given.model_name}, does not suit {name}. {exc}") from exc
    return given


def run_command(parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: list[str] | None) -> int:
    """Parse, run, and turn our own errors into a line; returns the exit status, see `failed` (wrong usage exits with 2)."""
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except RLSEditError as exc:
        return failed(exc)
    return 0


def failed(error: RLSEditError) -> int:
    """Say what went wrong, in a line; returns the exit status: 2 where what was given can't be used, 1 where it failed on the way."""
    print(f"easyedit-rls: {visible(str(error))}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1
