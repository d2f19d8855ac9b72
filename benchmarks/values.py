"""What makes values faster, and what it costs: one row a variant, each on a fresh model, in one process;
prints one JSON object.

    python benchmarks/values.py --model models/smollm2-135m --data pararel_dev.json --threads 1
    EASYEDIT_HOME=CHECKOUT python benchmarks/values.py …
        # with the peer's compute_z, a few facts of each batch in turn

A row gives seconds an edit (values, and keys and update), Adam steps, the values' final loss, and what the
edits are worth after the last batch. `--variant name=value,name=value` adds a row with other settings.
"""

import copy
import statistics
import sys
import time
from typing import Any

import torch
from common import as_json, load, machine, parser, records_of, settings_of, spread, versions
from omegaconf import OmegaConf
from peers import make_peer

from easyedit_rls import EditReport, RLSEditHyperParams, RLSEditor, evaluate, parse_requests

VARIANTS = {
    "shipped": {},
    "no statements": {"statements": []},
    "five templates": {"n_templates": 5},
    "no early stopping": {"early_stopping": "off"},
    "gradient": {"values": "gradient"},
}


def row(editor: RLSEditor, reports: list[EditReport], records: list[Any]) -> dict[str, Any]:
    facts = [fact for report in reports for fact in report.facts]
    n = [len(report.facts) for report in reports]
    return {
        "seconds_values": spread([report.seconds["values"] / k for report, k in zip(reports, n)]),
        "seconds_keys_and_update": spread([report.seconds["weights"] / k for report, k in zip(reports, n)]),
        "steps": statistics.fmean(fact.steps for fact in facts),
        "final_loss": statistics.fmean(fact.loss for fact in facts),
        "value_change": statistics.fmean(fact.value_change for fact in facts),
        "quality": evaluate(editor.model, editor.tok, records).means(),
    }


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "first", "count", "batch", "threads")
    options.add_argument(
        "--peer-facts",
        type=int,
        default=1,
        help="facts a batch for the peer; 0 for none (default: %(default)s)",
    )
    options.add_argument(
        "--variant", action="append", default=[], metavar="NAME=VALUE,…", help="one more row; may be repeated"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    variants = {
        **VARIANTS,
        **{v: OmegaConf.to_container(OmegaConf.from_dotlist(v.split(","))) for v in args.variant},
    }
    records = records_of(args)
    model, tok = load(args.model)
    shipped = settings_of(args, model).to_dict()
    editors = {
        name: RLSEditor(
            copy.deepcopy(model),
            tok,
            RLSEditHyperParams.from_dict({**shipped, **change}),
            show_progress=False,
        )
        for name, change in variants.items()
    }
    for editor in editors.values():
        editor.prepare()
    peer = None
    if args.peer_facts:
        settings = {**shipped, "early_stopping": "off"}
        peer = make_peer(
            model, tok, RLSEditHyperParams.from_dict(settings), editors["five templates"].state.templates
        )

    reports: dict[str, list[EditReport]] = {name: [] for name in editors}
    peer_seconds = []
    for start in range(0, len(records), args.batch):
        for name, editor in editors.items():
            reports[name].append(editor.edit(records[start : start + args.batch]))
            print(f"{name}: {reports[name][-1].seconds_per_edit:.2f} s/edit", file=sys.stderr)
        if peer is not None:
            some = parse_requests(records[start : start + args.peer_facts])
            begun = time.perf_counter()
            peer.edit(some)
            peer_seconds.append((time.perf_counter() - begun) / len(some))
            print(f"peer: {peer_seconds[-1]:.2f} s/edit", file=sys.stderr)
    result = {
        "records": [args.first, args.first + len(records)],
        "variants": {
            name: {"change": variants[name], **row(editor, reports[name], records)}
            for name, editor in editors.items()
        },
        "peer": None if peer is None else {"name": peer.name, "seconds_an_edit": spread(peer_seconds)},
        "settings": shipped,
        "versions": versions(),
        "machine": machine(),
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
