"""``python -m easyedit_rls.host``: EasyEdit's scripts with RLSEdit, and moments for its other editors."""

import argparse
import logging
import sys

from easyedit_rls._base.device import add_device, choose_device
from easyedit_rls.cli.loading import add_trust, failed
from easyedit_rls.config.files import shipped
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import RLSEditError
from easyedit_rls.host.moments import write_moments
from easyedit_rls.host.scripts import run_script
from easyedit_rls.model.load import load_model

_RUN = (
    "Run a script of EasyEdit, as its file is on disk, with RLSEdit among the methods that it knows. "
    "Every option behind the script is\n"
    "the script's own; --editing_method RLSEdit chooses this package, "
    "and --hparams_dir takes a YAML file or the name of shipped settings.\n"
    "\n"
    "  python -m easyedit_rls.host run examples/run_zsre_llama2.py "
    "--editing_method RLSEdit --hparams_dir llama-2-7b --data_dir data\n"
    "\n"
    "EasyEdit is found where it is importable, at EASYEDIT_HOME, or around the script. "
    "Other methods run as well, for comparison."
)

_MOMENTS = (
    "Compute the second moments of keys that MEMIT, AlphaEdit and others need, "
    "from text sampled from the model, a text file or a\n"
    "data set, and write them where EasyEdit looks before it downloads Wikipedia. Prints the files written."
)


def main(argv: list[str] | None = None) -> None:
    """Run a command; exits with a sentence if it fails, see `failed`, with 2 on wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m easyedit_rls.host", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    raw = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser(
        "run", help="run a script of EasyEdit with RLSEdit", description=_RUN, formatter_class=raw
    )
    run.add_argument(
        "script", help="path from here or from EasyEdit's folder, e.g. examples/run_zsre_llama2.py"
    )
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own options")
    files = commands.add_parser(
        "moments",
        help="write second moments for EasyEdit's editors",
        description=_MOMENTS,
        formatter_class=raw,
    )
    files.add_argument(
        "hparams", help=f"RLSEdit settings: a YAML file or a shipped name ({', '.join(shipped())})"
    )
    files.add_argument("--model", help="folder or hub name, instead of the settings' model_name")
    files.add_argument(
        "--text",
        metavar="SOURCE",
        help="shipped, self, a .txt file or a data set, instead of the settings' mom2_dataset",
    )
    files.add_argument(
        "--dataset",
        metavar="NAME",
        help="the mom2_dataset that the other editors' settings name, e.g. wikipedia",
    )
    files.add_argument(
        "--stats_dir",
        metavar="FOLDER",
        help="where EasyEdit keeps its moments, instead of the settings' stats_dir",
    )
    add_device(files)
    add_trust(files)
    try:
        args = parser.parse_args(argv)
        if args.command == "run":
            run_script(args.script, args.arguments)
        else:
            _moments(args)
    except RLSEditError as exc:
        sys.exit(failed(exc))


def _moments(args: argparse.Namespace) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    given = {"model_name": args.model, "mom2_dataset": args.text, "stats_dir": args.stats_dir}
    settings = RLSEditHyperParams.from_hparams(args.hparams).to_dict()
    hparams = RLSEditHyperParams.from_dict(
        {**settings, **{name: value for name, value in given.items() if value is not None}}
    )
    model, tok = load_model(
        hparams.model_name, device=choose_device(args.device), trust_remote_code=args.trust_remote_code
    )
    for path in write_moments(model, tok, hparams, dataset=args.dataset):
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
