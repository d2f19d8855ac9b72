"""``easyedit-rls locate``: where in a model facts sit, by causal tracing."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from easyedit_rls._base.arguments import at_least
from easyedit_rls._base.device import add_device, choose_device
from easyedit_rls._base.files import user_path
from easyedit_rls.cli.console import plain_console
from easyedit_rls.cli.loading import add_on_bad, add_trust, run_command
from easyedit_rls.cli.records import fitting
from easyedit_rls.cli.schema import check_folder
from easyedit_rls.data.records import EditRecord, read_records
from easyedit_rls.errors import RLSEditError
from easyedit_rls.model.load import load_model
from easyedit_rls.tuning.trace import KINDS, PLACES, Trace, refuse_untraceable, trace


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="easyedit-rls locate",
        description="Causal tracing (ROME, Meng et al. 2022) on your facts: blur the subject, "
        "put clean states back place by place, and see which give the model's own answer back. "
        "Draws a heat map for hidden states, MLPs and attentions. "
        "Advice for `layers`, not more: "
        "where a fact is recalled and where it is best edited need not be the same "
        "(Hase et al. 2023, arXiv 2301.04213).",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="folder or hub name of a causal language model, unedited"
    )
    parser.add_argument(
        "--data",
        type=user_path,
        required=True,
        metavar="FILE",
        help="records; prompt and subject count, facts the model knows",
    )
    parser.add_argument("--first", type=int, default=0, help="first record (default: %(default)s)")
    parser.add_argument("--count", type=int, default=10, help="number of records (default: %(default)s)")
    add_on_bad(parser)
    parser.add_argument("--samples", type=int, default=3, help="noises a fact (default: %(default)s)")
    parser.add_argument(
        "--window",
        type=int,
        help="layers put back at once, for MLPs and attentions (default: a fifth of the model's)",
    )
    add_device(parser)
    add_trust(parser)
    parser.add_argument(
        "--out", type=user_path, default=Path("outputs/locate"), help="folder to write (default: %(default)s)"
    )
    return run_command(parser, _locate, argv)


def _locate(arguments: argparse.Namespace) -> None:
    at_least(arguments.samples, 1, "--samples")
    if arguments.window is not None:
        at_least(arguments.window, 1, "--window")
    check_folder(arguments.out, "--out")
    read = read_records(arguments.data, arguments.first, arguments.count, on_bad=arguments.on_bad)
    model, tok = load_model(
        arguments.model, device=choose_device(arguments.device), trust_remote_code=arguments.trust_remote_code
    )

    def check(records: Sequence[EditRecord]) -> None:
        refuse_untraceable(model, tok, [record.request for record in records])

    kept = fitting(read, check, arguments.data, arguments.on_bad)
    found = trace(
        model,
        tok,
        [record.request for record in kept],
        samples=arguments.samples,
        window=arguments.window,
        show_progress=True,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "trace.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    _draw(found, arguments.out)
    console = plain_console()
    table = Table("Layer", "MLP", "Hidden state", "Attention", title="Given back at the subject's last token")
    last = PLACES.index("last subject token")
    for layer in range(found.effects["MLP"].shape[1]):
        row = [
            f"{float(found.effects[kind][last, layer]):.3f}" for kind in ("MLP", "hidden state", "attention")
        ]
        table.add_row(str(layer), *row, style="bold" if layer in found.advice() else None)
    console.print(table)
    console.print(
        f"P(answer) {found.clean:.3f} undisturbed, "
        f"{found.blurred:.3f} with the subject blurred; {found.n_facts} facts"
    )
    if found.clean < 2 * found.blurred:
        console.print("The model hardly needs these subjects to answer: give facts that it knows.")
    console.print(f"Advice: layers: {found.advice()}")
    console.print(f"Written to {arguments.out}: trace.png, trace.svg, trace.json")


def _draw(found: Trace, folder: Path) -> None:
    """One heat map a kind, places by layers."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as exc:
        raise RLSEditError("Drawing needs matplotlib. Install it: pip install 'easyedit-rls[tune]'.") from exc
    figure, axes = plt.subplots(len(KINDS), 1, figsize=(8, 7), sharex=True, constrained_layout=True)
    for axis, kind in zip(axes, KINDS):
        effect = found.effects[kind].numpy()
        largest = max(0.01, float(found.effects[kind].nan_to_num().max()))
        image = axis.imshow(effect, aspect="auto", cmap="cividis", vmin=0, vmax=largest)
        title = kind if kind == "hidden state" else f"{kind}, {found.window} layers around"
        axis.set(yticks=range(len(PLACES)), yticklabels=PLACES, title=f"{title} put back")
        figure.colorbar(image, ax=axis, label="P(answer) gained")
    axes[-1].set_xlabel("layer")
    figure.suptitle(
        f"P(answer) {found.clean:.2f} undisturbed, {found.blurred:.2f} blurred, {found.n_facts} facts"
    )
    for ending in ("png", "svg"):
        figure.savefig(folder / f"trace.{ending}", dpi=150)
    plt.close(figure)
