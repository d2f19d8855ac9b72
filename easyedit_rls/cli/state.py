"""``easyedit-rls state``: look at a ledger, take edits back, make the edited model again."""

import argparse
import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from easyedit_rls._base.files import user_path
from easyedit_rls.cli.console import plain_console, visible
from easyedit_rls.cli.ledgers import megabytes, moment_of, read_ledger
from easyedit_rls.cli.loading import add_trust, failed
from easyedit_rls.errors import LedgerError, RLSEditError
from easyedit_rls.ledger.compact import compact
from easyedit_rls.ledger.inspect import (
    LayerFigures,
    RebuildFigures,
    check_files,
    layer_figures,
    log_rows,
    rebuild_figures,
    size_on_disk,
    unexpected,
)
from easyedit_rls.ledger.journal import Journal
from easyedit_rls.ledger.ledger import Ledger
from easyedit_rls.ledger.reading import journals, latest, settled
from easyedit_rls.ledger.snapshot import read_manifest, read_prior
from easyedit_rls.ledger.state import EditorState

_WEIGHT_TOLERANCE = 1e-2  # of the edit's norm; float32 over long streams, see `verify`


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (0 fine, 1 it failed or found damage, 2 wrong usage)."""
    try:
        arguments = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except RLSEditError as exc:
        return failed(exc)


def _show(arguments: argparse.Namespace) -> int:
    summary = read_ledger(arguments.ledger, lambda journal: _summary(arguments.ledger, journal))
    layers = [LayerFigures(**figures) for figures in summary["layers"]]
    if arguments.json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return 0
    console = plain_console()
    console.print(
        f"{summary['edits']} edits in {summary['batches']} batches ({summary['edits_ever_made']} ever made)"
    )
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    say(f"of {summary['model'] or 'a model without a name'} ({summary['architecture']}, {summary['dtype']})")
    say(f"from {summary['created']} to {summary['last_change']}")
    say(f"{megabytes(summary['bytes_on_disk'])} on disk in {arguments.ledger}")
    settings = (
        f"{key} {summary['objective'][key]}"
        for key in ("lambda_reg", "mu_reg", "mom2_update_weight", "solver")
    )
    own = "".join(f", {key} {value}" for key, value in summary["objective"]["solver_settings"].items())
    say(f"objective: {', '.join(settings)}{own}")
    if summary["gate"] is not None:
        say(f"behind gates: tokens with leverage above {summary['gate']['threshold']:.3f} see the edits")
    if summary["shards"]:
        counts = [*summary["shards"], summary["edits"] - sum(summary["shards"])]
        say(f"in {len(counts)} shards, of {', '.join(map(str, counts))} edits; below is the last one")
    table = Table(
        *("Layer", "d_k×d_v", "Deviation", "Edits", "λ term", "μ term", "Drift", "Fill"),
        title="Edited layers",
        box=SIMPLE_HEAD,  # narrow enough for 80 columns
        pad_edge=False,
    )
    for f in layers:
        numbers = (
            f"{f.deviation:.4f}",
            f"{f.edits_term:.3g}",
            f"{f.deviation_term:.3g}",
            f"{f.anchor_term:.3g}",
            f"{f.drift:.1e}",
            "" if f.fill is None else f"{f.fill:.3f}",
        )
        table.add_row(str(f.layer), f"{f.d_k}×{f.d_v}", *numbers)
    console.print(table)
    bounds = [f.deviation_bound for f in layers if f.deviation_bound is not None]
    if bounds:
        say(f"no layer's deviation can exceed √J(W₀)/(λ‖W₀‖), {max(bounds):.3f} at most")
    console.print(
        "Deviation ‖W−W₀‖/‖W₀‖; the objective's terms: "
        "edits Σ d‖kW−v‖², λ²‖W−W₀‖², μ²‖K₀W−V₀‖²; drift: relative error of C; "
        "fill: share of the layer's memory that the edits have taken"
    )
    return 0


def _summary(folder: Path, journal: Journal) -> dict[str, Any]:
    """What `show` tells, of one moment."""
    manifest, moment = read_manifest(journal), moment_of(journal)
    layers = [
        layer_figures(read_prior(journal, n), solution, moment.history, n, manifest, len(moment.shards))
        for n, solution in moment.solutions.items()
    ]
    return {
        "ledger": str(folder),
        "shards": [shard.n_edits for shard in moment.shards],
        "model": manifest.model,
        "architecture": manifest.architecture,
        "dtype": manifest.dtype,
        "created": manifest.created,
        "last_change": journal.lines[-1].time,
        "edits": len(moment.history.live),
        "edits_ever_made": moment.history.next_id - 1,
        "batches": moment.history.n_batches,
        "bytes_on_disk": size_on_disk(folder),
        "objective": manifest.objective,
        "gate": None if moment.history.gate is None else asdict(moment.history.gate),
        "layers": [figures.to_dict() for figures in layers],
    }


def _log(arguments: argparse.Namespace) -> int:
    for row in read_ledger(arguments.ledger, log_rows):
        print(json.dumps(row, ensure_ascii=False) if arguments.json else visible(_log_line(row)))
    return 0


def _log_line(row: dict[str, Any]) -> str:
    if "id" not in row:
        return f"{row['time']}         {row['kind']} {' '.join(map(str, row['edits']))}".rstrip()
    mark = {"stands": " ", "superseded": "s", "retracted": "-", "rolled back": "x"}[row["status"]]
    return f"{row['time']} {mark}{row['id']:>6}  {row['prompt']} -> {row['target_new']}"


def _verify(arguments: argparse.Namespace) -> int:
    console = plain_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    if not arguments.ledger.is_dir() or not journals(arguments.ledger):
        raise LedgerError(f"{arguments.ledger} holds no ledger. Give the folder that was state_dir.")
    files = settled(
        arguments.ledger,
        lambda: list(check_files(arguments.ledger)),
        lambda found: all(p is None for _, p in found),
    )
    problems = [(path, problem) for path, problem in files if problem is not None]
    for path, problem in problems:
        say(visible(f"damaged {path}: {problem}"))
    say(f"{len(files)} files, {len(problems)} damaged")
    if problems:
        return 1
    for found in settled(arguments.ledger, lambda: unexpected(arguments.ledger), lambda found: not found):
        say(visible(f"has no place here, set aside by the next editor: {found}"))
    newest = latest(arguments.ledger)
    if arguments.files_only or newest is None or newest.is_closed:
        return 0
    figures = read_ledger(arguments.ledger, lambda journal: _all_rebuild_figures(journal))
    if not figures:
        say("Its rule has no batch solution to hold the state against; every change could be made once more.")
        return 0
    table = Table(
        "Layer",
        "C symmetric",
        "C positive definite",
        "Drift of C",
        "W against a rebuild",
        title="The state, in float64",
    )
    is_sound = True
    for f in figures:
        error = "–" if f.weight_error is None else f"{f.weight_error:.1e}"
        table.add_row(
            str(f.layer),
            *("yes" if fine else "NO" for fine in (f.is_symmetric, f.is_positive_definite)),
            f"{f.drift:.1e}",
            error,
        )
        is_sound &= f.is_symmetric and f.is_positive_definite and (f.weight_error or 0.0) < _WEIGHT_TOLERANCE
    console.print(table)
    if not is_sound:
        say(
            "The recursion has left the batch solution: "
            "raise lambda_reg or mom2_update_weight and edit anew from the log."
        )
    return 0 if is_sound else 1


def _all_rebuild_figures(journal: Journal) -> list[RebuildFigures]:
    moment = moment_of(journal)
    return [
        rebuild_figures(journal, moment, layer)
        for layer, solution in moment.solutions.items()
        if solution.solves_objective
    ]


def _retract(arguments: argparse.Namespace) -> int:
    with _held(arguments.ledger) as (ledger, journal):
        state = EditorState(ledger, ledger.place())
        state.now = moment_of(journal)
        wanted = state.history.check(arguments.edit_ids)
        texts = [state.history.live[edit_id].request for edit_id in wanted]
        state.retract(wanted, getattr(torch, read_manifest(journal).dtype))
        state.checkpoint(1)
    for edit_id, request in zip(wanted, texts):
        print(visible(f"retracted {edit_id}: {request.prompt} -> {request.target}"))
    print(
        f"{state.n_edits} edits stand. "
        "An editor's next start brings the model up to date; `state replay` saves it."
    )
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from easyedit_rls.cli.outputs import replay

    return replay(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from easyedit_rls.cli.outputs import export

    return export(arguments)


def _compact(arguments: argparse.Namespace) -> int:
    with _held(arguments.ledger) as (ledger, journal):
        before = size_on_disk(arguments.ledger)
        compact(ledger, journal, moment_of(journal))
    print(f"{megabytes(before)} before, {megabytes(size_on_disk(arguments.ledger))} after")
    return 0


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[tuple[Ledger, Journal]]:
    """A ledger that is locked while the block runs."""
    read_ledger(folder, lambda journal: journal)  # so that a mistyped folder is not made
    ledger = Ledger(folder)
    try:
        journal = ledger.open()
        assert journal is not None
        yield ledger, journal
    finally:
        ledger.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="easyedit-rls state",
        description="Look at a ledger (the folder that was state_dir), "
        "take edits back, make the edited model again.",
        epilog="`easyedit-rls state COMMAND --help` says what a command reads and writes.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(
        name: str, run: Callable[[argparse.Namespace], int], brief: str, details: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=brief, description=f"{brief[0].upper()}{brief[1:]}. {details}"
        )
        command.add_argument("ledger", type=user_path, metavar="LEDGER", help="the folder that was state_dir")
        command.set_defaults(run=run)
        return command

    reads = "Reads the ledger; writes nothing, and works while an editor writes."
    show = add(
        "show", _show, "what is in it: edits, batches, layers, size, and the objective's three terms", reads
    )
    show.add_argument("--json", action="store_true", help="as one JSON object")
    log = add(
        "log",
        _log,
        "one line an edit, with its number and what became of it (- retracted, s superseded, x rolled back)",
        reads,
    )
    log.add_argument(
        "--json",
        action="store_true",
        help="as one JSON object a line, with everything that is known of the edit",
    )
    verify = add(
        "verify",
        _verify,
        "check every file against its checksum, and the state against a rebuild from all edits in float64",
        f"{reads} Exits with 1 if anything is damaged.",
    )
    verify.add_argument(
        "--files-only", action="store_true", help="checksums alone; the rebuild costs O(d_k³) a layer"
    )
    retract = add(
        "retract",
        _retract,
        "take edits out exactly, as if they had never been made",
        "Reads the ledger; writes an entry and a checkpoint to it. No model is needed.",
    )
    retract.add_argument(
        "edit_ids", type=int, nargs="+", metavar="ID", help="numbers of the edits, from `log`"
    )
    replayed = add(
        "replay",
        _replay,
        "apply the ledger to the unedited model and save it",
        (
            "Reads the ledger and MODEL, which must be the one that was edited; "
            "writes an ordinary model folder, OUT, with the tokenizer; edits behind gates (memory: gated) "
            "lie beside the unedited model there, with gate.py, which loads them."
        ),
    )
    replayed.add_argument("model", metavar="MODEL", help="folder or hub name of the unedited model")
    replayed.add_argument("out", type=user_path, metavar="OUT", help="folder to write")
    replayed.add_argument(
        "--from-start",
        action="store_true",
        help="make every change once more instead of starting at the last checkpoint",
    )
    replayed.add_argument(
        "--merge",
        action="store_true",
        help="write edits behind gates (memory: gated) into the weights; prints what that costs other text",
    )
    add_trust(replayed)
    export = add(
        "export",
        _export,
        "save the edit as a PEFT LoRA adapter, and print the error that makes",
        (
            "Reads the ledger; writes adapter_config.json and adapter_model.safetensors "
            "to the folder of --lora. Needs no model."
        ),
    )
    export.add_argument("--lora", type=user_path, required=True, metavar="OUT", help="folder to write")
    export.add_argument(
        "--rank",
        type=int,
        metavar="R",
        help="rank of the adapter; by default the smallest that leaves out 0.1 %% of the edit",
    )
    add(
        "compact",
        _compact,
        "drop what no longer counts: edits that were taken back, roll-backs, forgotten journals",
        (
            "Reads the ledger and writes it anew, then removes the old files. "
            "The state stays bit for bit the same."
        ),
    )
    return parser
