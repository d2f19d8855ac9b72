"""Edits out of a ledger: a model with them (``state replay``), an adapter (``state export``)."""

import argparse
import sys
import warnings
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedModel

from easyedit_rls.cli.console import plain_console, visible
from easyedit_rls.cli.ledgers import megabytes, moment_of, read_ledger, refuse_inside, refuse_same_folder
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.editors.gated import GatedMemory, behind_gates
from easyedit_rls.editors.transaction import WeightMemory
from easyedit_rls.errors import ModelError
from easyedit_rls.evaluation import perplexity
from easyedit_rls.ledger.export import edited_weights, write_adapter
from easyedit_rls.ledger.snapshot import read_manifest, read_prior
from easyedit_rls.model.gate import has_gates, merge_gates, save_edited
from easyedit_rls.model.load import load_tokenizer, load_weights


def replay(arguments: argparse.Namespace) -> int:
    """Apply the ledger to the unedited model and save it."""
    refuse_same_folder(arguments.out, arguments.model, "the unedited model would be lost")
    refuse_inside(arguments.out, arguments.ledger)
    manifest, moment, start = read_ledger(
        arguments.ledger,
        lambda journal: (
            read_manifest(journal),
            moment_of(journal, arguments.from_start),
            read_prior(journal, min(map(int, read_manifest(journal).parameters))),
        ),
    )
    trust = arguments.trust_remote_code
    model = load_weights(arguments.model, manifest.dtype, trust_remote_code=trust)
    edited = edited_weights(model, manifest, moment)
    try:
        tok = load_tokenizer(arguments.model, trust_remote_code=trust)
    except ModelError as exc:
        tok = None
        print(f"No tokenizer was saved. {visible(str(exc))}", file=sys.stderr)
    n = len(moment.history.live)
    if moment.history.gate is None:
        WeightMemory(edited).show(moment)
        said = f"{n} edits written into {arguments.model}, saved as {arguments.out}"
    else:
        memory = GatedMemory(behind_gates(edited))
        memory.begin(lambda layer: start)
        memory.show(moment)
        said = f"{n} edits behind gates of {arguments.model}, saved as {arguments.out}"
    if moment.history.gate is not None and arguments.merge:
        said = f"{n} edits written into {arguments.model}, without their gates, saved as {arguments.out}"
        behind = perplexity(model, tok, packaged_text("demo_text.txt")) if tok is not None else None
        merge_gates(model)
        if tok is not None:
            merged = perplexity(model, tok, packaged_text("demo_text.txt"))
            said += f"; perplexity of ordinary text {behind:.2f} -> {merged:.2f}"
    save_model(model, arguments.out)
    if tok is not None:
        tok.save_pretrained(arguments.out)
    print(said)
    return 0


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a model as `save_pretrained` does, and beside it the edits that stand behind gates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The model's edits stand behind gates")
        model.save_pretrained(folder)
    if has_gates(model):
        save_edited(model, folder)


def export(arguments: argparse.Namespace) -> int:
    """Save the edit as a LoRA adapter."""
    refuse_inside(arguments.lora, arguments.ledger)
    manifest, moment = read_ledger(
        arguments.ledger, lambda journal: (read_manifest(journal), moment_of(journal))
    )
    report = write_adapter(arguments.lora, manifest, moment, arguments.rank)
    table = Table(
        "Layer", "‖ΔW − BA‖/‖ΔW‖", title=f"LoRA adapter of rank {report.rank}, {megabytes(report.n_bytes)}"
    )
    for layer, error in report.errors.items():
        table.add_row(str(layer), f"{error:.1e}")
    console = plain_console()
    console.print(table)
    console.print(
        f"Written to {arguments.lora}: adapter_config.json, adapter_model.safetensors", soft_wrap=True
    )
    if moment.history.gate is not None:
        console.print(
            "An adapter has no gate: every token sees the edits there. `state replay` keeps the gate.",
            soft_wrap=True,
        )
    return 0
