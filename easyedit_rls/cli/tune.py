"""``easyedit-rls tune``: search for a model's settings on development records."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from easyedit_rls._base.arguments import at_least
from easyedit_rls._base.device import add_device, choose_device
from easyedit_rls._base.files import read_text, user_path
from easyedit_rls._base.progress import progress_bar
from easyedit_rls.cli.console import plain_console
from easyedit_rls.cli.loading import add_on_bad, add_trust, run_command, settings_for
from easyedit_rls.cli.records import fits, fitting
from easyedit_rls.cli.schema import check_folder
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.data.records import read_records
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.model.load import load_model
from easyedit_rls.tuning.search import Search, Trial
from easyedit_rls.tuning.trial import MEASURED

_QUICK_TOLERANCE = 0.4  # of the moments during the search; the file keeps its own


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="easyedit-rls tune",
        description="Search for the settings of a model: the layers, v_lr, clamp_norm_factor, "
        "overshoot, n_0 (mom2_update_weight) and λ, or the own settings of another update rule (solver). "
        "Each trial edits the same development records and is judged by the harmonic mean of "
        "rewrite accuracy, paraphrase accuracy, specificity, and 1 − relative loss of perplexity. "
        "Report results on other records than these.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of a causal language model")
    parser.add_argument(
        "--data", type=user_path, required=True, metavar="FILE", help="development records (docs/records.md)"
    )
    parser.add_argument("--first", type=int, default=0, help="first record (default: %(default)s)")
    parser.add_argument("--count", type=int, default=40, help="number of records (default: %(default)s)")
    add_on_bad(parser)
    parser.add_argument("--batch", type=int, default=10, help="edits a batch (default: %(default)s)")
    parser.add_argument(
        "--text", type=user_path, metavar="FILE", help="plain text for the perplexity (default: the demo's)"
    )
    parser.add_argument(
        "--hparams",
        metavar="FILE",
        help="settings to begin with (default: those `easyedit-rls init` would write)",
    )
    parser.add_argument("--trials", type=int, default=30, help="at most so many (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="time limit, moments included (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    add_device(parser)
    add_trust(parser)
    parser.add_argument(
        "--out", type=user_path, default=Path("outputs/tune"), help="folder to write (default: %(default)s)"
    )
    return run_command(parser, _tune, argv)


def _tune(arguments: argparse.Namespace) -> None:
    console = plain_console()
    for name, least in (("batch", 1), ("trials", 1), ("seed", 0)):
        at_least(getattr(arguments, name), least, f"--{name}")
    if not 0 < arguments.minutes < math.inf:
        raise HyperParamsError(f"--minutes is {arguments.minutes}; allowed: above 0.")
    check_folder(arguments.out, "--out")
    read = read_records(arguments.data, arguments.first, arguments.count, on_bad=arguments.on_bad)
    text = _text(arguments.text)
    with progress_bar(None, "tuning", "trial", True) as bar:
        model, tok = load_model(
            arguments.model,
            device=choose_device(arguments.device),
            trust_remote_code=arguments.trust_remote_code,
        )
        hparams = settings_for(model, arguments.model, arguments.hparams)
        quick = RLSEditHyperParams.from_dict(
            {**hparams.to_dict(), "mom2_tolerance": max(_QUICK_TOLERANCE, hparams.mom2_tolerance)}
        )
        kept = fitting(read, fits(model, tok, quick), arguments.data, arguments.on_bad)
        search = Search(
            model,
            tok,
            quick,
            [record.request for record in kept],
            text,
            batch=arguments.batch,
            seed=arguments.seed,
        )
        bar.set_postfix_str("taking the moments")
        search.prepare()

        def show(trial: Trial) -> None:
            bar.update(1)
            bar.set_postfix_str(f"best {search.best.objective:.3f}")
            bar.write(_line(trial))

        left = 60 * arguments.minutes - bar.format_dict["elapsed"]
        best = search.run(arguments.trials, left, show)
    arguments.out.mkdir(parents=True, exist_ok=True)
    found = RLSEditHyperParams.from_dict({**hparams.to_dict(), **best.changes})
    note = (
        f"# Settings of RLSEdit for {arguments.model}, "
        f"the best of {len(search.trials)} that `easyedit-rls tune` tried.\n"
    )
    (arguments.out / "best.yaml").write_text(note + found.to_yaml(), encoding="utf-8")
    (arguments.out / "trials.json").write_text(
        json.dumps([asdict(trial) for trial in search.trials], indent=1) + "\n", encoding="utf-8"
    )
    console.print(_table(search.trials, best))
    console.print(f"Written to {arguments.out}: best.yaml (settings), trials.json (all that was tried)")


def _line(trial: Trial) -> str:
    return (
        f"{trial.number}: {trial.objective:.3f}  {_settings(trial)}  "
        f"({trial.error or f'{trial.seconds:.0f} s'})"
    )


def _settings(trial: Trial) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in trial.changes.items())


def _short(value: object) -> str:
    if isinstance(value, list):
        return f"{value[0]}–{value[-1]}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _table(trials: list[Trial], best: Trial) -> Table:
    caption = "RA, PA: rewrite and paraphrase accuracy; NS: specificity"
    table = Table(
        "Trial",
        "Objective",
        "RA",
        "PA",
        "NS",
        "Perplexity",
        "Settings",
        title="What was tried, best first",
        caption=caption,
    )
    for trial in sorted(trials, key=lambda trial: -trial.objective):
        shown = [trial.figures.get(name) for name in MEASURED]
        numbers = ["–" if value is None else f"{value:.3f}" for value in shown]
        row = [str(trial.number), f"{trial.objective:.3f}", *numbers, _settings(trial)]
        table.add_row(*row, style="bold" if trial is best else None)
    return table


def _text(path: Path | None) -> str:
    return packaged_text("demo_text.txt") if path is None else read_text(path, cure="Check --text.")
