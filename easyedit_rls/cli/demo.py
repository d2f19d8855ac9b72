"""``easyedit-rls demo``: edit facts into a real model, batch after batch, then measure all of them."""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import transformers
from omegaconf import DictConfig
from rich.console import Console
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import easyedit_rls
from easyedit_rls._base.files import read_text, user_path
from easyedit_rls.cli import report
from easyedit_rls.cli.command import command, output_folder
from easyedit_rls.cli.console import plain_console
from easyedit_rls.cli.loading import settings_for
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.packaged import demo_facts, packaged_text
from easyedit_rls.data.records import read_records
from easyedit_rls.data.requests import EditRequest, parse_requests
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.errors import HyperParamsError, LayoutError
from easyedit_rls.evaluation import Evaluation, evaluate, generate, perplexity
from easyedit_rls.evaluation.metrics import summarize
from easyedit_rls.model.load import load_model


@command("demo")
def main(config: DictConfig) -> None:
    """Hydra entry point; see ``--help``."""
    console = plain_console()
    if config.hparams is not None:
        RLSEditHyperParams.from_hparams(config.hparams)  # what can't be read fails before the model is loaded
    if config.facts is None:
        records = demo_facts()
    else:
        records = [record.request for record in read_records(config.facts)]
    is_ours = config.text is None
    text = packaged_text("demo_text.txt") if is_ours else read_text(config.text, cure="Change text=.")
    _cut(records, config.batches)  # a wrong number fails here too
    if not (user_path(config.model) / "config.json").is_file():
        raise LayoutError(
            f"No model in {user_path(config.model).absolute()}. "
            f"Run `easyedit-rls demo-model out={config.model}`, or `make demo`."
        )
    model, tok = load_model(config.model, trust_remote_code=config.trust_remote_code)
    hparams = settings_for(model, config.model, config.hparams)
    batches = _cut(parse_requests(records, chat_template=hparams.chat_template), config.batches)
    source = config.hparams or "settings made from the model"
    console.print(
        f"{len(records)} facts in {len(batches)} batches, {source}, {torch.get_num_threads()} threads"
    )
    summary = _run(model, tok, hparams, batches, text, config.completions, console)
    summary["settings"] = {
        "hparams": hparams.to_dict(),
        "batches": config.batches,
        "facts": config.facts,
        "model": str(config.model),
    }

    out = output_folder(config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(
        json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (out / "report.md").write_text(report.markdown(summary), encoding="utf-8")
    report.plot_retention(summary["retention"], out / "retention.png")
    report.show(summary, console)
    console.print(f"Written to {out}: summary.json, report.md, retention.png")


def _run(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    batches: Sequence[Sequence[EditRequest]],
    text: str,
    n_completions: int,
    console: Console,
) -> dict[str, Any]:
    records = [record for batch in batches for record in batch]
    shown = records[:: max(1, len(records) // max(1, n_completions))][:n_completions]
    start = time.perf_counter()
    before = _measure(model, tok, records, text)
    completions_before = _complete(model, tok, shown)

    editor = RLSEditor(model, tok, hparams, show_progress=True)
    reports, retention = [], []
    for t, batch in enumerate(tqdm(batches, desc="batches", unit="batch")):
        reports.append(editor.edit(batch))
        retention.append(_retention(model, tok, batches[: t + 1]))
        accuracies = " ".join(f"{entry['rewrite_accuracy']:.2f}" for entry in retention[-1])
        console.print(f"after batch {t + 1}: rewrite accuracy of the batches so far: {accuracies}")

    after = _measure(model, tok, records, text)
    completions_after = _complete(model, tok, shown)
    total_s = time.perf_counter() - start
    prepare_s = sum(r.seconds["prepare"] for r in reports)
    return {
        "n_edits": len(records),
        "before": before,
        "after": after,
        "first_batch_after": retention[-1][0],
        "seconds_per_edit": sum(r.seconds_per_edit * len(r.facts) for r in reports) / len(records),
        "seconds_prepare": prepare_s,
        "seconds_editing_and_evaluation": total_s - prepare_s,
        "completions": [
            {"prompt": r.prompt, "target": r.target, "before": b, "after": a}
            for r, b, a in zip(shown, completions_before, completions_after)
        ],
        "retention": retention,
        "batches": [r.to_dict() for r in reports],
        "versions": {
            "easyedit_rls": easyedit_rls.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "threads": torch.get_num_threads(),
        },
    }


def _measure(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRequest], text: str
) -> dict[str, float | None]:
    evaluation = evaluate(model, tok, records, show_progress=True)
    return {**evaluation.means(), "perplexity": perplexity(model, tok, text, show_progress=True)}


def _retention(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, batches: Sequence[Sequence[EditRequest]]
) -> list[dict[str, float | None]]:
    """How each batch so far fares now: one entry a batch, neighbors left out."""
    records = [replace(record, neighbors=()) for batch in batches for record in batch]
    scores = evaluate(model, tok, records, show_progress=True).records
    ends = [sum(len(batch) for batch in batches[: i + 1]) for i in range(len(batches))]
    per_batch: list[Evaluation] = [
        summarize(scores[end - len(batch) : end]) for end, batch in zip(ends, batches)
    ]
    return [evaluation.means() for evaluation in per_batch]


def _complete(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRequest]
) -> list[str]:
    """Greedy completions of the edited prompts, one line each."""
    prompts = [record.probe(record.prompt, record.target) for record in records]
    return [
        " ".join(text.split())
        for text in generate(model, tok, prompts, max_new_tokens=10, show_progress=False)
    ]


def _cut(records: list[EditRequest], n_batches: int) -> list[list[EditRequest]]:
    if not 1 <= n_batches <= len(records):
        raise HyperParamsError(f"batches is {n_batches}; allowed: 1 to the number of facts, {len(records)}.")
    size = -(-len(records) // n_batches)
    return [records[start : start + size] for start in range(0, len(records), size)]


if __name__ == "__main__":
    main()
