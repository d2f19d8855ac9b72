"""Edit a stream of records in batches, then measure all of them; prints one JSON object.

    python benchmarks/stream.py --model MODEL --data pararel_dev.json --text wikitext2_test.txt \
        --first 2000 --count 100 --batch 20

`--hparams init` makes the settings from the model; `--set name=value` overrides one, e.g. `--set v_lr=0.3
--set layers=[5,6,7]`.
"""

import sys
import time
from dataclasses import asdict

from common import as_json, load, machine, parser, records_of, settings_of, versions

from easyedit_rls import RLSEditor, evaluate, merge_gates, perplexity


def main() -> None:
    options = parser(
        __doc__, "model", "data", "text", "hparams", "first", "count", "batch", "set", count=100, batch=20
    )
    options.add_argument(
        "--ppl-tokens", type=int, default=8192, help="tokens of the text to use (default: %(default)s)"
    )
    options.add_argument(
        "--merged", action="store_true", help="measure a second time without the gates (memory=gated)"
    )
    options.add_argument("--skip-before", action="store_true", help="do not measure the unedited model")
    args = options.parse_args()

    records = records_of(args)
    text = args.text.read_text(encoding="utf-8")
    model, tok = load(args.model)
    hparams = settings_of(args, model)

    def measure() -> dict[str, float | None]:
        return {
            **evaluate(model, tok, records).means(),
            "perplexity": perplexity(model, tok, text, max_tokens=args.ppl_tokens),
        }

    before = None if args.skip_before else measure()
    editor = RLSEditor(model, tok, hparams)
    reports = []
    for start in range(0, len(records), args.batch):
        report = editor.edit(records[start : start + args.batch])
        reports.append(report)
        print(f"batch {report.batch}: {report.seconds_per_edit:.2f} s/edit", file=sys.stderr)
    start_s = time.perf_counter()
    after = measure()
    facts = [fact for report in reports for fact in report.facts]
    first_batch, first_hundred = (evaluate(model, tok, records[:n]).means() for n in (args.batch, 100))
    took_s = time.perf_counter() - start_s
    gate = editor.memory.gate
    if args.merged:
        merge_gates(model)
    result = {
        "records": [args.first, args.first + len(records)],
        "batch": args.batch,
        "before": before,
        "after": after,
        "first_batch_after": first_batch,
        "first_hundred_after": first_hundred,
        "gate": None if gate is None else asdict(gate),
        "merged": measure() if args.merged else None,
        "seconds_per_edit": sum(r.seconds_per_edit * len(r.facts) for r in reports) / len(facts),
        "seconds_prepare": reports[0].seconds["prepare"],
        "seconds_values_weights": [[r.seconds["values"], r.seconds["weights"]] for r in reports],
        "seconds_evaluation": took_s,
        "mean_steps": sum(f.steps for f in facts) / len(facts),
        "mean_value_change": sum(f.value_change for f in facts) / len(facts),
        "mean_miss": sum(f.miss for f in facts) / len(facts),
        "unsaid_after_their_batch": sum(len(report.unsaid) for report in reports),
        "deviation": {layer.layer: layer.deviation for layer in reports[-1].layers},
        "drift": {layer.layer: layer.drift for layer in reports[-1].layers},
        "settings": hparams.to_dict(),
        "versions": versions(),
        "machine": machine(),
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
