"""``easyedit-rls init``: a settings file for a model that has none."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from easyedit_rls._base.files import user_path
from easyedit_rls.cli.console import plain_console
from easyedit_rls.cli.loading import add_trust, run_command
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.model.discovery import read_structure
from easyedit_rls.model.load import load_model
from easyedit_rls.tuning.trial import MEASURED, FirstLook, try_settings

_FACTS = 8
_PARAMETERS_A_MINUTE = 130e6  # SmolLM2-135M takes a minute


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="easyedit-rls init",
        description="Read a model's layout off its modules and write a complete settings file for it, "
        "each setting explained. Layers are those at the depth that was tuned on SmolLM2-135M; "
        "`easyedit-rls tune` finds better ones. "
        "Then the settings are tried on a handful of facts, and it says what they do, or what to change.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a causal language model")
    parser.add_argument(
        "--out", type=user_path, help="file to write (default: the model's name, .yaml, here)"
    )
    parser.add_argument("--force", action="store_true", help="write over a file that is there")
    parser.add_argument("--no-trial", action="store_true", help="write the file, and try nothing")
    add_trust(parser)
    return run_command(parser, _init, argv)


def _init(arguments: argparse.Namespace) -> None:
    out = arguments.out or Path(f"{Path(arguments.model).name}.yaml")
    if out.exists() and not arguments.force:
        raise HyperParamsError(f"{out} is there already. Give another --out, or --force.")
    model, tok = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    structure = read_structure(model)
    hparams = RLSEditHyperParams.for_model(model, model_name=str(arguments.model))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(
        f"# Settings of RLSEdit for {arguments.model}, made by `easyedit-rls init`.\n{hparams.to_yaml()}",
        encoding="utf-8",
    )
    console = plain_console()
    table = Table("Part", "Found", title=f"{type(model).__name__}")
    table.add_row("decoder layers", f"{structure.layers} (0 to {structure.n_layers - 1})")
    table.add_row("edited weight", f"{structure.projection}, {structure.key_width} × {structure.hidden}")
    table.add_row("attention", structure.attention)
    table.add_row("final norm", structure.final_norm or "none")
    table.add_row("head", f"{structure.head}{', tied to the embedding' if structure.is_tied else ''}")
    table.add_row("layers to edit", ", ".join(map(str, hparams.layers)))
    if hparams.value_at == "output":
        table.add_row("values", "at the outputs of the edited MLPs, since a norm stands behind them")
        table.add_row("v_lr", f"{hparams.v_lr:g} of the outputs' lengths")
    else:
        table.add_row(
            "v_lr", f"{hparams.v_lr:g}, from the length of the hidden states at layer {hparams.layers[-1]}"
        )
    console.print(table)
    console.print(f"Written to {out}.", soft_wrap=True)
    if not arguments.no_trial:
        minutes = max(
            1, round(sum(parameter.numel() for parameter in model.parameters()) / _PARAMETERS_A_MINUTE)
        )
        console.print(
            f"Trying them on {_FACTS} facts, about {minutes} min on one core (--no-trial leaves it out) ...",
            soft_wrap=True,
        )
        _show(try_settings(model, tok, hparams, n_facts=_FACTS), console)
    console.print(
        f"Next: easyedit-rls tune {arguments.model} --data RECORDS.json --hparams {out}", soft_wrap=True
    )


def _show(look: FirstLook, console: Console) -> None:
    """What the settings did, and what to change."""
    titles = ("rewrite accuracy", "paraphrase accuracy", "specificity", "perplexity of the demo's text")
    table = Table("", "Before", "After", title=f"{_FACTS} facts in one batch, {look.seconds:.0f} s")
    for name, title in zip(MEASURED, titles, strict=True):
        table.add_row(
            title, f"{look.before[name]:.3f}", f"{look.after[name]:.3f}" if look.after else "refused"
        )
    if look.report is not None:
        table.add_row("largest step of a layer", "", f"{look.largest_step:.3f}")
    console.print(table)
    for sentence in look.advice() or [
        "These settings will do: every fact is said, and other text has hardly changed."
    ]:
        console.print(sentence, soft_wrap=True)
