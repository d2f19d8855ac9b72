"""What the ledger costs: bytes an edit, seconds to append, to checkpoint and to resume; prints one JSON
object.

    python benchmarks/ledger.py                      # widths of SmolLM2-135M and of Llama-3-8B, random keys
    python benchmarks/ledger.py --widths 1536x576 --layers 5 --batch 10
    python benchmarks/ledger.py --widths --layers --model models/smollm2-135m --data pararel_dev.json
        # share of an edit's time

With --widths, the keys, targets and weights are random: no model is edited, the ledger does what it does for
one. Each figure is the median of the repetitions, with the least and the largest beside it. With --model,
records are edited for real, with a checkpoint after every batch and with one at the end alone.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import as_json, load, machine, parser, records_of, settings_of, spread, versions

from easyedit_rls import RLSEditor
from easyedit_rls.anchors.prior import LayerStart
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.ledger import Ledger
from easyedit_rls.ledger.history import Edit, Entry
from easyedit_rls.ledger.journal import FORMAT, MANIFEST, entry_event, entry_of
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.snapshot import prior_files, read_moment, write_checkpoint
from easyedit_rls.solvers.batch import Beginning
from easyedit_rls.solvers.rls import RecursiveLeastSquares


def manifest(layers: list[int], d_k: int, d_v: int) -> bytes:
    """Of a model that does not exist."""
    widths = {str(layer): [d_k, d_v] for layer in layers}
    names = {str(layer): f"layers.{layer}.mlp.down_proj.weight" for layer in layers}
    objective = {"lambda_reg": 1.0, "mu_reg": 0.0}
    modules = {layer: "Linear" for layer in names}
    return Manifest(
        FORMAT, "", "", "random", "Random", "float32", "", modules, names, widths, objective, "none", [], {}
    ).encode()


def solution(layer: int, d_k: int, d_v: int) -> RecursiveLeastSquares:
    """A prior of λ = 1 alone, without inverting anything."""
    generator = torch.Generator().manual_seed(layer)
    return RecursiveLeastSquares.assemble(
        torch.eye(d_k), torch.randn(d_k, d_v, generator=generator), torch.eye(d_k), None, 0, f"layer {layer}"
    )


def prior(one: RecursiveLeastSquares) -> LayerStart:
    """The same as a prior."""
    return LayerStart(one, one.weight, Beginning(None, None, 1.0, 0.0, one.weight, None), None)


def entry(batch: int, size: int) -> Entry:
    """A batch with texts of the usual length."""
    first = batch * size + 1
    requests = [
        EditRequest("The mother tongue of ", f"Person Number {first + i}", " is", "English")
        for i in range(size)
    ]
    return Entry(
        "edit", tuple(Edit(first + i, request, i) for i, request in enumerate(requests)), weights="0" * 16
    )


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(d_k: int, d_v: int, n_layers: int, size: int, n_batches: int) -> dict[str, object]:
    layers = list(range(n_layers))
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        now = Moment(solutions={layer: solution(layer, d_k, d_v) for layer in layers})
        ledger = Ledger(Path(folder))
        files = {
            MANIFEST: manifest(layers, d_k, d_v),
            **prior_files({n: prior(one) for n, one in now.solutions.items()}),
        }
        prior_bytes = sum(map(len, files.values()))
        appends, updates, entry_bytes, begin_s = [], [], [], 0.0
        for batch in range(n_batches):
            data = {"importance": torch.ones(size)}
            after = {}
            for layer, one in now.solutions.items():
                K = torch.randn(size, d_k, generator=generator) / d_k**0.5
                V = torch.randn(size, d_v, generator=generator)
                start = time.perf_counter()
                after[layer] = one.update(K, V)
                updates.append(time.perf_counter() - start)
                data |= {f"K.{layer}": K, f"V.{layer}": V}
            made = replace(entry(batch, size), factors=dict.fromkeys(layers, 1.0))
            start = time.perf_counter()
            event = entry_event(made, data)
            place, line = (
                ledger.record(now.place, event) if batch else ledger.begin(now.place, files, {}, [[event]])
            )
            if batch:
                appends.append(time.perf_counter() - start)
            else:
                begin_s = time.perf_counter() - start
            now = now.changed(after, (), now.history.plus(entry_of(place.folder, line)), place)
            entry_bytes.append(len(event.data) + len(json.dumps(made.to_dict())))
            print(f"{d_k}: batch {batch + 1} of {n_batches}", file=sys.stderr)
        replay_s = timed(lambda: read_moment(ledger.open()))
        checkpoints = []
        for _ in range(3):
            start = time.perf_counter()
            now = write_checkpoint(ledger, now)
            checkpoints.append(time.perf_counter() - start)
        checkpoint_bytes = sum(
            (now.place.folder / name).stat().st_size for name in now.place.position.checkpoints[-1]
        )
        resumes = [timed(lambda: read_moment(ledger.open())) for _ in range(3)]
        again = read_moment(ledger.open())
        is_same = all(
            torch.equal(again.solutions[layer].weight, one.weight) for layer, one in now.solutions.items()
        )
        ledger.close()
    return {
        "d_k": d_k,
        "d_v": d_v,
        "layers": n_layers,
        "batch": size,
        "bytes_an_edit": statistics.mean(entry_bytes) / size,
        "bytes_prior": prior_bytes,
        "bytes_checkpoint": checkpoint_bytes,
        "seconds_begin": begin_s,
        "seconds_append": spread(appends),
        "seconds_checkpoint": spread(checkpoints),
        "seconds_resume_from_checkpoint": spread(resumes),
        "seconds_resume_by_replaying_all_batches": {"batches": n_batches, "seconds": replay_s},
        "seconds_update_a_layer": spread(updates),
        "resumed_bit_for_bit": is_same,
    }


def share(args: argparse.Namespace) -> list[dict[str, object]]:
    """What part of an edit's time the ledger takes, for two ways of checkpointing."""
    records, size = records_of(args), args.batch
    results = []
    for every in (1, 10**6):
        model, tok = load(args.model)
        with tempfile.TemporaryDirectory() as place:
            hp = settings_of(args, model, {"checkpoint_every": every})
            editor = RLSEditor(model, tok, hp, state_dir=place)
            reports = [editor.edit(records[start : start + size]) for start in range(0, len(records), size)]
            close_s = timed(editor.close)
        work_s = sum(report.seconds["values"] + report.seconds["weights"] for report in reports)
        ledger_s = sum(report.seconds["ledger"] for report in reports) + close_s
        results.append(
            {
                "checkpoint_every": every if every == 1 else "at the end",
                "records": [args.first, args.first + len(records)],
                "batch": size,
                "layers": hp.layers,
                "seconds_an_edit": (work_s + ledger_s) / len(records),
                "seconds_ledger_a_batch": [report.seconds["ledger"] for report in reports],
                "seconds_close": close_s,
                "share_of_the_ledger": ledger_s / (work_s + ledger_s),
            }
        )
    return results


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "first", "count", "batch", model=None, data=None)
    options.add_argument(
        "--widths",
        nargs="*",
        default=["1536x576", "14336x4096"],
        help="d_k x d_v of the layers (default: %(default)s)",
    )
    options.add_argument(
        "--layers",
        nargs="*",
        type=int,
        default=[5, 1],
        help="edited layers, for each width (default: %(default)s)",
    )
    options.add_argument("--batches", type=int, default=6, help="batches to append (default: %(default)s)")
    args = options.parse_args()
    results: list[object] = []
    if args.model:
        results += share(args)
    for widths, n_layers in zip(args.widths, args.layers, strict=True):
        d_k, d_v = map(int, widths.split("x"))
        results.append(measure(d_k, d_v, n_layers, args.batch, args.batches))
    print(as_json({"results": results, "machine": machine(), "versions": versions()}))


if __name__ == "__main__":
    main()
