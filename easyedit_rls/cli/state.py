"""``easyedit-rls state``: look at a ledger, take edits back, make the edited model again."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from easyedit_rls.errors import LedgerError, RLSEditError
from easyedit_rls.history import Entry, replay
from easyedit_rls.ledger.compact import compact
from easyedit_rls.ledger.inspect import check_files, debris, layer_figures, log_rows, rebuild_figures, size_on_disk
from easyedit_rls.ledger.journal import Journal
from easyedit_rls.ledger.ledger import Ledger, latest
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.snapshot import Snapshot, read_manifest, read_prior, read_state, write_checkpoint
from easyedit_rls.model.weights import weights_fingerprint
from easyedit_rls.progress import progress_bar

_WEIGHT_TOLERANCE = 1e-2  # of the edit's norm; float32 over long streams, see `verify`


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (0 fine, 1 it failed or found damage, 2 wrong usage)."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except RLSEditError as exc:
        print(f"easyedit-rls: {exc}", file=sys.stderr)
        return 1


def _show(arguments: argparse.Namespace) -> int:
    journal = _journal(arguments.ledger)
    manifest, snapshot = read_manifest(journal), _state(journal)
    layers = []
    for layer, solution in snapshot.solutions.items():
        layers.append(layer_figures(read_prior(journal, layer), solution, snapshot.history, layer, manifest))
    history = snapshot.history
    summary = {
        "ledger": str(arguments.ledger),
        "model": manifest.model,
        "architecture": manifest.architecture,
        "dtype": manifest.dtype,
        "created": manifest.created,
        "last_change": journal.lines[-1].time,
        "edits": len(history.live),
        "edits_ever_made": history.next_id - 1,
        "batches": history.n_batches,
        "bytes_on_disk": size_on_disk(arguments.ledger),
        "objective": manifest.objective,
        "layers": [figures.to_dict() for figures in layers],
    }
    if arguments.json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return 0
    console = Console()
    console.print(f"[b]{summary['edits']} edits[/b] in {summary['batches']} batches ({summary['edits_ever_made']} ever made)")
    console.print(f"of {manifest.model or 'a model without a name'} ({manifest.architecture}, {manifest.dtype})")
    console.print(f"from {manifest.created} to {summary['last_change']}")
    console.print(f"{_megabytes(size_on_disk(arguments.ledger))} on disk in {arguments.ledger}")
    settings = ", ".join(f"{key} {manifest.objective[key]}" for key in ("lambda_reg", "mu_reg", "mom2_update_weight", "forgetting_factor"))
    console.print(f"objective: {settings}")
    table = Table("Layer", "d_k × d_v", "Deviation", "Edits", "λ term", "μ term", "Drift", title="Edited layers")
    for f in layers:
        numbers = (f"{f.deviation:.4f}", f"{f.edits_term:.4g}", f"{f.deviation_term:.4g}", f"{f.anchor_term:.4g}", f"{f.drift:.1e}")
        table.add_row(str(f.layer), f"{f.d_k} × {f.d_v}", *numbers)
    console.print(table)
    console.print("Deviation ‖W−W₀‖/‖W₀‖; the objective's terms: edits Σ d‖kW−v‖², λ²‖W−W₀‖², μ²‖K₀W−V₀‖²; drift: relative error of C")
    return 0


def _log(arguments: argparse.Namespace) -> int:
    for row in log_rows(_journal(arguments.ledger)):
        print(json.dumps(row, ensure_ascii=False) if arguments.json else _log_line(row))
    return 0


def _log_line(row: dict[str, Any]) -> str:
    if "id" not in row:
        return f"{row['time']}         {row['kind']} {' '.join(map(str, row['edits']))}".rstrip()
    mark = {"stands": " ", "superseded": "s", "retracted": "-", "rolled back": "x"}[row["status"]]
    return f"{row['time']} {mark}{row['id']:>6}  {row['prompt']} -> {row['target_new']}"


def _verify(arguments: argparse.Namespace) -> int:
    console = Console()
    problems = []
    files = list(check_files(arguments.ledger)) if arguments.ledger.is_dir() else []
    if not files:
        raise LedgerError(f"{arguments.ledger} holds no ledger. Give the folder that was state_dir.")
    for path, problem in files:
        if problem is not None:
            problems.append(problem)
            console.print(f"[red]damaged[/red] {path}: {problem}", soft_wrap=True)
    console.print(f"{len(files)} files, {len(problems)} damaged")
    if problems:
        return 1
    for path in debris(arguments.ledger):
        console.print(f"left by an interrupted writer, cleared away by the next: {path}", soft_wrap=True)
    journal = latest(arguments.ledger)
    if arguments.files_only or journal is None or journal.is_closed:
        return 0
    snapshot = _state(journal)
    table = Table("Layer", "C symmetric", "C positive definite", "Drift of C", "W against a rebuild", title="The state, in float64")
    is_sound = True
    for layer in snapshot.solutions:
        f = rebuild_figures(journal, snapshot, layer)
        error = "–" if f.weight_error is None else f"{f.weight_error:.1e}"
        table.add_row(str(layer), *("yes" if fine else "NO" for fine in (f.is_symmetric, f.is_positive_definite)), f"{f.drift:.1e}", error)
        is_sound &= f.is_symmetric and f.is_positive_definite and (f.weight_error or 0.0) < _WEIGHT_TOLERANCE
    console.print(table)
    if not is_sound:
        console.print("The recursion has left the batch solution: raise lambda_reg or mom2_update_weight and edit anew from the log.")
    return 0 if is_sound else 1


def _retract(arguments: argparse.Namespace) -> int:
    with _Held(arguments.ledger) as (_, journal, manifest):
        snapshot = _state(journal)
        wanted = snapshot.history.check(arguments.edit_ids)
        texts = [snapshot.history.live[edit_id].request for edit_id in wanted]
        entry = Entry("retract", removed=tuple(wanted))
        replay(snapshot.solutions, entry, snapshot.history, lambda layer: read_prior(journal, layer).solution)
        journal.append_entry(replace(entry, weights=_fingerprint(snapshot, manifest)), {})
        write_checkpoint(journal, snapshot.solutions)
    for edit_id, request in zip(wanted, texts):
        print(f"retracted {edit_id}: {request.prompt} -> {request.target}")
    print(f"{len(snapshot.history.live)} edits stand. An editor's next start brings the model up to date; `state replay` saves it.")
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from easyedit_rls.ledger.export import write_weights

    journal = _journal(arguments.ledger)
    manifest = read_manifest(journal)
    with progress_bar(len(journal.lines), "replay", "event", None) as bar:
        snapshot = read_state(journal, from_start=arguments.from_start, progress=bar)
    try:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, manifest.dtype))
    except OSError as exc:
        raise LedgerError(
            f"{arguments.model} can't be loaded: {str(exc).splitlines()[0]}. Give the unedited model's folder or name."
        ) from exc
    write_weights(model, manifest, snapshot)
    model.save_pretrained(arguments.out)
    try:
        AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.out)
    except (OSError, ValueError):
        print(f"{arguments.model} has no tokenizer; none was saved", file=sys.stderr)
    print(f"{len(snapshot.history.live)} edits written into {arguments.model}, saved as {arguments.out}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from easyedit_rls.ledger.export import write_adapter

    journal = _journal(arguments.ledger)
    report = write_adapter(arguments.lora, read_manifest(journal), _state(journal), arguments.rank)
    table = Table("Layer", "‖ΔW − BA‖/‖ΔW‖", title=f"LoRA adapter of rank {report.rank}, {_megabytes(report.n_bytes)}")
    for layer, error in report.errors.items():
        table.add_row(str(layer), f"{error:.1e}")
    console = Console()
    console.print(table)
    console.print(f"Written to {arguments.lora}: adapter_config.json, adapter_model.safetensors", soft_wrap=True)
    return 0


def _compact(arguments: argparse.Namespace) -> int:
    with _Held(arguments.ledger) as (ledger, journal, _):
        before = size_on_disk(arguments.ledger)
        compact(ledger, journal, _state(journal))
    print(f"{_megabytes(before)} before, {_megabytes(size_on_disk(arguments.ledger))} after")
    return 0


class _Held:
    """A ledger that is locked while the block runs."""

    def __init__(self, folder: Path) -> None:
        _journal(folder)  # so that a mistyped folder is not made
        self._ledger = Ledger(folder)

    def __enter__(self) -> tuple[Ledger, Journal, Manifest]:
        journal = self._ledger.open()
        if journal is None:
            self._ledger.close()
            raise LedgerError(f"All edits in {self._ledger.folder} were forgotten (reset); there is nothing to do.")
        return self._ledger, journal, read_manifest(journal)

    def __exit__(self, *_: object) -> None:
        self._ledger.close()


def _journal(folder: Path) -> Journal:
    journal = latest(folder) if folder.is_dir() else None
    if journal is None:
        raise LedgerError(f"{folder} holds no ledger. Give the folder that was state_dir.")
    if journal.is_closed:
        raise LedgerError(f"All edits in {folder} were forgotten (reset) at {journal.lines[-1].time}. There is nothing to look at.")
    return journal


def _state(journal: Journal) -> Snapshot:
    with progress_bar(len(journal.lines), "ledger", "event", None) as bar:
        return read_state(journal, progress=bar)


def _fingerprint(snapshot: Snapshot, manifest: Manifest) -> str:
    dtype = getattr(torch, manifest.dtype)
    return weights_fingerprint({layer: solution.weight.to(dtype) for layer, solution in snapshot.solutions.items()})


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="easyedit-rls state",
        description="Look at a ledger (the folder that was state_dir), take edits back, make the edited model again.",
        epilog="`easyedit-rls state COMMAND --help` says what a command reads and writes.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], brief: str, details: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=brief, description=f"{brief[0].upper()}{brief[1:]}. {details}")
        command.add_argument("ledger", type=Path, metavar="LEDGER", help="the folder that was state_dir")
        command.set_defaults(run=run)
        return command

    reads = "Reads the ledger; writes nothing, and works while an editor writes."
    show = add("show", _show, "what is in it: edits, batches, layers, size, and the objective's three terms", reads)
    show.add_argument("--json", action="store_true", help="as one JSON object")
    log = add("log", _log, "one line an edit, with its number and what became of it (- retracted, s superseded, x rolled back)", reads)
    log.add_argument("--json", action="store_true", help="as one JSON object a line, with everything that is known of the edit")
    verify = add(
        "verify",
        _verify,
        "check every file against its checksum, and the state against a rebuild from all edits in float64",
        f"{reads} Exits with 1 if anything is damaged.",
    )
    verify.add_argument("--files-only", action="store_true", help="checksums alone; the rebuild costs O(d_k³) a layer")
    retract = add(
        "retract",
        _retract,
        "take edits out exactly, as if they had never been made",
        "Reads the ledger; writes an entry and a checkpoint to it. No model is needed.",
    )
    retract.add_argument("edit_ids", type=int, nargs="+", metavar="ID", help="numbers of the edits, from `log`")
    replayed = add(
        "replay",
        _replay,
        "apply the ledger to the unedited model and save it",
        "Reads the ledger and MODEL, which must be the one that was edited; writes an ordinary model folder, OUT, with the tokenizer.",
    )
    replayed.add_argument("model", metavar="MODEL", help="folder or hub name of the unedited model")
    replayed.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    replayed.add_argument(
        "--from-start", action="store_true", help="make every change once more instead of starting at the last checkpoint"
    )
    export = add(
        "export",
        _export,
        "save the edit as a PEFT LoRA adapter, and print the error that makes",
        "Reads the ledger; writes adapter_config.json and adapter_model.safetensors to the folder of --lora. Needs no model.",
    )
    export.add_argument("--lora", type=Path, required=True, metavar="OUT", help="folder to write")
    export.add_argument(
        "--rank", type=int, metavar="R", help="rank of the adapter; by default the smallest that leaves out 0.1 %% of the edit"
    )
    add(
        "compact",
        _compact,
        "drop what no longer counts: edits that were taken back, roll-backs, forgotten journals",
        "Reads the ledger and writes it anew, then removes the old files. The state stays bit for bit the same.",
    )
    return parser
