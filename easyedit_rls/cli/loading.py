"""What commands have in common: an option, settings that suit a model, and how those without hydra end."""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedModel

from easyedit_rls.anchors.text import check_source
from easyedit_rls.cli.console import plain_warnings, visible
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.records import ON_BAD
from easyedit_rls.errors import InputError, LayoutError, RLSEditError
from easyedit_rls.model.layout import find_layout


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The option for models that bring code of their own; see `model.load.load_model`."""
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model (auto_map); read it before you do",
    )


def add_on_bad(parser: argparse.ArgumentParser) -> None:
    """The option that `read_records` has."""
    parser.add_argument(
        "--on-bad",
        choices=ON_BAD,
        default=ON_BAD[0],
        help="records that are wrong: end, or leave them out (default: %(default)s)",
    )


def settings_for(
    model: PreTrainedModel, name: str, hparams: str | None, changes: Mapping[str, Any] | None = None
) -> RLSEditHyperParams:
    """Settings by file or shipped name; made from the model where none are given.

    Args:
        model: what they shall fit.
        name: its folder or hub name.
        hparams: a file or a shipped name; None makes them from the model.
        changes: settings that shall differ.

    Raises:
        HyperParamsError: the file can't be read, or a value is out of range.
        LayoutError: the settings are another model's; names the file and every difference.
        AnchorError: the text that they name for second moments can't be read.
    """
    changes = changes or {}
    if hparams is None:
        found = RLSEditHyperParams.for_model(model, **{"model_name": name, **changes})
    else:
        found = RLSEditHyperParams.from_dict(
            {**RLSEditHyperParams.from_hparams(hparams).to_dict(), **changes}, source=hparams
        )
        try:
            find_layout(model, found)
        except LayoutError as exc:
            raise LayoutError(f"{hparams}, for {found.model_name}, does not suit {name}. {exc}") from exc
    check_source(found.mom2_dataset)
    return found


def run_command(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: list[str] | None
) -> int:
    """Parse, run, and turn our own errors into a line; returns the exit status, see `failed` (wrong usage
    exits with 2).
    """
    try:
        with plain_warnings():
            run(parser.parse_args(argv))
    except RLSEditError as exc:
        return failed(exc)
    return 0


def failed(error: RLSEditError) -> int:
    """Say what went wrong, in a line; returns the exit status: 2 where what was given can't be used, 1 where
    it failed on the way.
    """
    print(f"easyedit-rls: {visible(str(error))}", file=sys.stderr)
    return 2 if isinstance(error, InputError) else 1
