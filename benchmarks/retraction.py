"""Edit facts into a model with a ledger, take some of them back, resume in a fresh model, and measure; prints one JSON object.

    python benchmarks/retraction.py --model MODEL --data pararel_dev.json --first 2000 --edits 60 --retract 20 --batch 20

Every third fact is taken back. "Back to its unedited answer" is judged three ways: does it prefer the true answer or the new one as it did
before (CounterFact's comparison), is the most probable next token the same, and are the five tokens of the greedy continuation.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import machine, versions
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, parse_requests


def answers(model, tok, records, n_tokens: int) -> list[list[int]]:
    """Greedy continuations of the prompts."""
    found = []
    for record in parse_requests(records):
        prompt = tok(record.prompt, return_tensors="pt")
        out = model.generate(**prompt, max_new_tokens=n_tokens, min_new_tokens=n_tokens, do_sample=False, pad_token_id=tok.eos_token_id)
        found.append(out[0, prompt["input_ids"].shape[1] :].tolist())
    return found


def agreement(before: list[list[int]], after: list[list[int]], n_tokens: int) -> float:
    return sum(a[:n_tokens] == b[:n_tokens] for a, b in zip(before, after)) / len(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name of the model")
    parser.add_argument("--data", type=Path, required=True, help="records in CounterFact's JSON format")
    parser.add_argument("--hparams", default="smollm2-135m", help="settings: a YAML file or a shipped name (default: %(default)s)")
    parser.add_argument("--first", type=int, default=2000, help="first record (default: %(default)s)")
    parser.add_argument("--edits", type=int, default=60, help="facts to edit in (default: %(default)s)")
    parser.add_argument("--retract", type=int, default=20, help="facts to take back (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=20, help="edits a batch (default: %(default)s)")
    parser.add_argument("--baseline", action="store_true", help="also edit a model with the facts that stay alone, and compare with it")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="override a setting; may be repeated")
    args = parser.parse_args()

    settings = {**RLSEditHyperParams.from_hparams(args.hparams).to_dict(), **OmegaConf.to_container(OmegaConf.from_dotlist(args.set))}
    hparams = RLSEditHyperParams.from_dict(settings, source="--set")
    records = json.loads(args.data.read_text(encoding="utf-8"))[args.first : args.first + args.edits]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tok = AutoTokenizer.from_pretrained(args.model)
    unedited, never = copy.deepcopy(model), copy.deepcopy(model)
    step = args.edits // args.retract
    gone = list(range(0, args.retract * step, step))
    gone_records = [records[i] for i in gone]
    kept_records = [record for i, record in enumerate(records) if i not in gone]
    answers_unedited = answers(model, tok, gone_records, 5)
    preferred_unedited = [record.efficacy for record in evaluate(model, tok, gone_records).records]

    with tempfile.TemporaryDirectory() as folder:
        editor = RLSEditor(model, tok, hparams, state_dir=folder)
        reports = []
        for start in range(0, len(records), args.batch):
            reports.append(editor.edit(records[start : start + args.batch]))
            print(f"batch {reports[-1].batch}: {reports[-1].seconds_per_edit:.2f} s/edit", file=sys.stderr)
        numbers = [fact.edit_id for report in reports for fact in report.facts]
        answers_edited = answers(model, tok, gone_records, 5)
        edited = evaluate(model, tok, records).means()
        start_s = time.perf_counter()
        editor.retract([numbers[i] for i in gone])
        retract_s = time.perf_counter() - start_s
        editor.close()
        start_s = time.perf_counter()
        resumed = RLSEditor(unedited, tok, hparams, state_dir=folder)
        resume_s = time.perf_counter() - start_s
        is_same = all(torch.equal(a, b) for a, b in zip(model.parameters(), unedited.parameters()))
        resumed.close()
    answers_retracted = answers(model, tok, gone_records, 5)
    preferred_retracted = [record.efficacy for record in evaluate(model, tok, gone_records).records]
    baseline = None
    if args.baseline:
        alone = RLSEditor(never, tok, hparams)
        for start in range(0, len(records), args.batch):
            alone.edit([records[i] for i in range(start, min(start + args.batch, len(records))) if i not in gone])
        answers_never = answers(never, tok, gone_records, 5)
        baseline = {
            "never_edited_and_unedited_next_token": agreement(answers_unedited, answers_never, 1),
            "never_edited_and_retracted_next_token": agreement(answers_never, answers_retracted, 1),
            "never_edited_and_retracted_five_tokens": agreement(answers_never, answers_retracted, 5),
        }
    work_s = sum(report.seconds["values"] + report.seconds["weights"] for report in reports)
    ledger_s = sum(report.seconds["ledger"] for report in reports)
    result = {
        "records": [args.first, args.first + args.edits],
        "retracted": len(gone),
        "after_the_edits": edited,
        "kept_after_retraction": evaluate(model, tok, kept_records).means(),
        "retracted_after_retraction": evaluate(model, tok, gone_records).means(),
        "retracted_back_to_unedited": {
            "preferred_answer": sum(a == b for a, b in zip(preferred_unedited, preferred_retracted)) / len(gone),
            "next_token": agreement(answers_unedited, answers_retracted, 1),
            "five_tokens": agreement(answers_unedited, answers_retracted, 5),
            "next_token_before_retraction": agreement(answers_unedited, answers_edited, 1),
        },
        "baseline": baseline,
        "resumed_bit_for_bit": is_same,
        "seconds": {"retract": retract_s, "resume": resume_s, "an_edit": work_s / len(records)},
        "ledger_share_of_editing": ledger_s / (work_s + ledger_s),
        "settings": hparams.to_dict(),
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
