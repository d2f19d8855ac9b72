"""Edit facts into a model with a ledger, take some of them back, resume in a fresh model, and measure; prints
one JSON object.

    python benchmarks/retraction.py --model MODEL --data pararel_dev.json --first 2000 \
        --edits 60 --retract 20 --batch 20

Every third fact is taken back. "Back to its unedited answer" is judged three ways: does it prefer the true
answer or the new one as it did before (CounterFact's comparison), is the most probable next token the same,
and are the five tokens of the greedy continuation.
"""

import copy
import sys
import tempfile
import time

import torch
from common import as_json, load, machine, parser, records_of, settings_of, versions

from easyedit_rls import RLSEditor, evaluate, parse_requests
from easyedit_rls.model.generation import greedy, write_on
from easyedit_rls.model.subject import prompt_rows


def answers(model, tok, records, n_tokens: int) -> list[list[int]]:
    """Greedy continuations of the prompts."""
    found = []
    config = greedy(model, tok, max_new_tokens=n_tokens, min_new_tokens=n_tokens)
    for record in parse_requests(records):
        prompt = torch.tensor(prompt_rows(tok, [record.prompt]))
        out = write_on(model, tok, prompt, torch.ones_like(prompt), config)
        found.append(out[0, prompt.shape[1] :].tolist())
    return found


def agreement(before: list[list[int]], after: list[list[int]], n_tokens: int) -> float:
    return sum(a[:n_tokens] == b[:n_tokens] for a, b in zip(before, after)) / len(before)


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "first", "batch", "set", batch=20)
    options.add_argument(
        "--count",
        "--edits",
        type=int,
        default=60,
        dest="count",
        help="facts to edit in (default: %(default)s)",
    )
    options.add_argument("--retract", type=int, default=20, help="facts to take back (default: %(default)s)")
    options.add_argument(
        "--baseline",
        action="store_true",
        help="also edit a model with the facts that stay alone, and compare with it",
    )
    args = options.parse_args()

    records = records_of(args)
    model, tok = load(args.model)
    hparams = settings_of(args, model)
    unedited, never = copy.deepcopy(model), copy.deepcopy(model)
    step = args.count // args.retract
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
            alone.edit(
                [records[i] for i in range(start, min(start + args.batch, len(records))) if i not in gone]
            )
        answers_never = answers(never, tok, gone_records, 5)
        baseline = {
            "never_edited_and_unedited_next_token": agreement(answers_unedited, answers_never, 1),
            "never_edited_and_retracted_next_token": agreement(answers_never, answers_retracted, 1),
            "never_edited_and_retracted_five_tokens": agreement(answers_never, answers_retracted, 5),
        }
    work_s = sum(report.seconds["values"] + report.seconds["weights"] for report in reports)
    ledger_s = sum(report.seconds["ledger"] for report in reports)
    result = {
        "records": [args.first, args.first + args.count],
        "retracted": len(gone),
        "after_the_edits": edited,
        "kept_after_retraction": evaluate(model, tok, kept_records).means(),
        "retracted_after_retraction": evaluate(model, tok, gone_records).means(),
        "retracted_back_to_unedited": {
            "preferred_answer": sum(a == b for a, b in zip(preferred_unedited, preferred_retracted))
            / len(gone),
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
    print(as_json(result))


if __name__ == "__main__":
    main()
