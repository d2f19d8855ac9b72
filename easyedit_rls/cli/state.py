"""``easyedit-rls state``: look at a ledger, take edits back, make the edited model again."""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.table import Table

from easyedit_rls._base.files import user_path
from easyedit_rls._base.progress import progress_bar
from easyedit_rls.cli.console import plain_console, visible
from easyedit_rls.cli.loading import add_trust, failed
from easyedit_rls.errors import LedgerError, ModelError, RLSEditError
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
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.reading import at_one_moment, journals, latest, settled
from easyedit_rls.ledger.snapshot import read_manifest, read_moment, read_prior
from easyedit_rls.ledger.state import EditorState

T = TypeVar("T")

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
    summary = _read(arguments.ledger, lambda journal: _summary(arguments.ledger, journal))
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
    say(f"{_megabytes(summary['bytes_on_disk'])} on disk in {arguments.ledger}")
    settings = (
        f"{key} {summary['objective'][key]}"
        for key in ("lambda_reg", "mu_reg", "mom2_update_weight", "solver")
    )
    own = "".join(f", {key} {value}" for key, value in summary["objective"]["solver_settings"].items())
    say(f"objective: {', '.join(settings)}{own}")
    table = Table(
        "Layer", "d_k × d_v", "Deviation", "Edits", "λ term", "μ term", "Drift", title="Edited layers"
    )
    for f in layers:
        numbers = (
            f"{f.deviation:.4f}",
            f"{f.edits_term:.4g}",
            f"{f.deviation_term:.4g}",
            f"{f.anchor_term:.4g}",
            f"{f.drift:.1e}",
        )
        table.add_row(str(f.layer), f"{f.d_k} × {f.d_v}", *numbers)
    console.print(table)
    console.print(
        "Deviation ‖W−W₀‖/‖W₀‖; the objective's terms: "
        "edits Σ d‖kW−v‖², λ²‖W−W₀‖², μ²‖K₀W−V₀‖²; drift: relative error of C"
    )
    return 0


def _summary(folder: Path, journal: Journal) -> dict[str, Any]:
    """What `show` tells, of one moment."""
    manifest, moment = read_manifest(journal), _moment(journal)
    layers = [
        layer_figures(read_prior(journal, n), solution, moment.history, n, manifest)
        for n, solution in moment.solutions.items()
    ]
    return {
        "ledger": str(folder),
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
        "layers": [figures.to_dict() for figures in layers],
    }


def _log(arguments: argparse.Namespace) -> int:
    for row in _read(arguments.ledger, log_rows):
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
    figures = _read(arguments.ledger, lambda journal: _all_rebuild_figures(journal))
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
    moment = _moment(journal)
    return [
        rebuild_figures(journal, moment, layer)
        for layer, solution in moment.solutions.items()
        if solution.solves_objective
    ]


def _retract(arguments: argparse.Namespace) -> int:
    with _held(arguments.ledger) as (ledger, journal):
        state = EditorState(ledger, ledger.place())
        state.now = _moment(journal)
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
    from easyedit_rls.editors.transaction import WeightMemory
    from easyedit_rls.ledger.export import edited_weights
    from easyedit_rls.model.load import load_tokenizer, load_weights

    _refuse_same_folder(arguments.out, arguments.model, "the unedited model would be lost")
    _refuse_inside(arguments.out, arguments.ledger)
    manifest, moment = _read(
        arguments.ledger, lambda journal: (read_manifest(journal), _moment(journal, arguments.from_start))
    )
    trust = arguments.trust_remote_code
    model = load_weights(arguments.model, manifest.dtype, trust_remote_code=trust)
    WeightMemory(edited_weights(model, manifest, moment)).show(moment)
    model.save_pretrained(arguments.out)
    try:
        load_tokenizer(arguments.model, trust_remote_code=trust).save_pretrained(arguments.out)
    except ModelError as exc:
        print(f"No tokenizer was saved. {visible(str(exc))}", file=sys.stderr)
    print(f"{len(moment.history.live)} edits written into {arguments.model}, saved as {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from easyedit_rls.ledger.export import write_adapter

    _refuse_inside(arguments.lora, arguments.ledger)
    manifest, moment = _read(arguments.ledger, lambda journal: (read_manifest(journal), _moment(journal)))
    report = write_adapter(arguments.lora, manifest, moment, arguments.rank)
    table = Table(
        "Layer", "‖ΔW − BA‖/‖ΔW‖", title=f"LoRA adapter of rank {report.rank}, {_megabytes(report.n_bytes)}"
    )
    for layer, error in report.errors.items():
        table.add_row(str(layer), f"{error:.1e}")
    console = plain_console()
    console.print(table)
    console.print(
        f"Written to {arguments.lora}: adapter_config.json, adapter_model.safetensors", soft_wrap=True
    )
    return 0


def _compact(arguments: argparse.Namespace) -> int:
    with _held(arguments.ledger) as (ledger, journal):
        before = size_on_disk(arguments.ledger)
        compact(ledger, journal, _moment(journal))
    print(f"{_megabytes(before)} before, {_megabytes(size_on_disk(arguments.ledger))} after")
    return 0


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[tuple[Ledger, Journal]]:
    """A ledger that is locked while the block runs."""
    _read(folder, lambda journal: journal)  # so that a mistyped folder is not made
    ledger = Ledger(folder)
    try:
        journal = ledger.open()
        assert journal is not None
        yield ledger, journal
    finally:
        ledger.close()


def _read(folder: Path, read: Callable[[Journal], T]) -> T:
    """What a function reads of the journal in use, all of one moment."""

    def look(journal: Journal) -> T:
        if journal.is_closed:
            raise LedgerError(
                f"All edits in {folder} were forgotten (reset) at {journal.lines[-1].time}. "
                "There is nothing to look at."
            )
        return read(journal)

    if not folder.is_dir():
        raise LedgerError(f"{folder} holds no ledger. Give the folder that was state_dir.")
    return at_one_moment(folder, look)


def _moment(journal: Journal, from_start: bool = False) -> Moment:
    with progress_bar(len(journal.lines), "ledger", "event", None) as bar:
        return read_moment(journal, from_start=from_start, progress=bar)


def _refuse_same_folder(out: Path, other: str, why: str) -> None:
    if out.exists() and Path(other).exists() and out.samefile(other):
        raise LedgerError(f"{out} is {other}: {why}. Give another folder to write to.")


def _refuse_inside(out: Path, ledger: Path) -> None:
    if ledger.resolve() in (out.resolve(), *out.resolve().parents):
        raise LedgerError(
            f"{out} lies within the ledger, where nothing else has a place. Give another folder to write to."
        )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


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
            "writes an ordinary model folder, OUT, with the tokenizer."
        ),
    )
    replayed.add_argument("model", metavar="MODEL", help="folder or hub name of the unedited model")
    replayed.add_argument("out", type=user_path, metavar="OUT", help="folder to write")
    replayed.add_argument(
        "--from-start",
        action="store_true",
        help="make every change once more instead of starting at the last checkpoint",
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
