"""Seconds an edit that each update rule takes beside the values, which are the same for all; prints one JSON
object.

    python benchmarks/rule_times.py --model models/smollm2-135m --data counterfact.json --count 60 --batch 20

Values are one gradient step, since they don't matter here. Batches of the rules alternate, each rule on a
model of its own; medians over the batches, with the least and the largest.
"""

import dataclasses

import torch
from common import as_json, load, machine, parser, settings_of, spread, versions

from easyedit_rls import RLSEditor
from easyedit_rls.data.records import read_records

RULES = (
    "rls", "forgetting", "memit", "memit_seq", "emmet", "alphaedit", "betaedit", "evoedit", "lyaplock",
    "alphaedit-sphere", "memit_seq-rect", "memit_seq-rect-ote", "memit_seq-prune",
)  # fmt: skip


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "set", "first", "count", "batch", "threads")
    options.add_argument("--rules", nargs="+", default=RULES, help="solvers (default: all)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    requests = [record.request for record in read_records(args.data, args.first, args.count)]
    editors = {}
    for name in (*args.rules, "rls, gated"):
        model, tok = load(args.model)
        rule, _, gated = name.partition(", ")
        changes = {"values": "gradient", "solver": rule, "max_deviation": "off", "on_conflict": "keep"}
        hp = settings_of(args, model, {**changes, "memory": gated or "weights"})
        editors[name] = RLSEditor(
            model, tok, dataclasses.replace(hp, solver_settings={}), show_progress=False
        )
        editors[name].prepare()
    seen: dict[str, list[float]] = {}
    for at in range(0, len(requests), args.batch):
        batch = requests[at : at + args.batch]
        for name, editor in editors.items():
            seen.setdefault(name, []).append(editor.edit(batch).seconds["weights"] / len(batch))
    found = {name: spread(seconds) for name, seconds in seen.items()}
    print(as_json({"seconds": found, "batch": args.batch, **versions(), "machine": machine()}))


if __name__ == "__main__":
    main()
