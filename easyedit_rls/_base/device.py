"""Which device a command works on."""

import argparse

import torch

from easyedit_rls.errors import ModelError


def choose_device(asked: str | None) -> str:
    """Name of the device to work on.

    Args:
        asked: cpu, cuda, cuda:1, …; None takes a GPU where PyTorch sees one.

    Raises:
        ModelError: PyTorch sees no such device.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is None:
        return "cuda" if n_gpus else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError as exc:
        raise ModelError(
            f"device {asked!r} is none that PyTorch knows. Take cpu, cuda, or one of several: cuda:1."
        ) from exc
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise ModelError(
            f"PyTorch sees {n_gpus or 'no'} GPU{'s' * (n_gpus > 1)}, so not {asked}. "
            "Take device cpu, or install a build for your GPU."
        )
    return asked


def add_device(parser: argparse.ArgumentParser) -> None:
    """The option that `choose_device` reads."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU where PyTorch sees one)")
