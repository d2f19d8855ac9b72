"""``easyedit-rls init``: a settings file for a model that has none."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from easyedit_rls.cli.loading import load_model, run_command
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.model.structure import read_structure


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="easyedit-rls init",
        description="Read a model's layout off its modules and write a complete settings file for it, each setting explained. "
        "Layers are those at the published settings' depth; `easyedit-rls tune` finds better ones.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a causal language model")
    parser.add_argument("--out", type=Path, help="file to write (default: the model's name, .yaml, here)")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    return run_command(parser, _init, argv)


def _init(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path(f"{Path(arguments.model).name}.yaml")
    if out.exists() and not arguments.force:
        raise HyperParamsError(f"{out} is there already. Give another --out, or --force.")
    model, _ = load_model(arguments.model)
    structure = read_structure(model)
    hparams = RLSEditHyperParams.for_model(model, model_name=str(arguments.model))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(f"# Settings of RLSEdit for {arguments.model}, made by `easyedit-rls init`.\n{hparams.to_yaml()}", encoding="utf-8")
    console = Console()
    table = Table("Part", "Found", title=f"{type(model).__name__}")
    table.add_row("decoder layers", f"{structure.layers} (0 to {structure.n_layers - 1})")
    table.add_row("edited weight", f"{structure.projection}, {structure.key_width} × {structure.hidden}")
    table.add_row("attention", structure.attention)
    table.add_row("final norm", structure.final_norm or "none")
    table.add_row("head", f"{structure.head}{', tied to the embedding' if structure.is_tied else ''}")
    table.add_row("layers to edit", ", ".join(map(str, hparams.layers)))
    table.add_row("v_lr", f"{hparams.v_lr:g}, from the length of the hidden states at layer {hparams.layers[-1]}")
    console.print(table)
    console.print(f"Written to {out}. Next: easyedit-rls tune {arguments.model} --data RECORDS.json --hparams {out}", soft_wrap=True)
