"""Second moments from nothing: time, tokens, and what the number of tokens is worth; prints one JSON object.

    python benchmarks/anchors.py --model models/smollm2-135m --data pararel_dev.json \
        --text wikitext2_test.txt --layers 6 7 8 9 10

Each source is read once with each of the `--tolerances` and once to the end (`--texts` of it), each from an
empty cache; with each, the same stream is edited and measured. A source is what `mom2_dataset` takes:
shipped, self, or a text file. `--texts 0` leaves the whole text out.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import as_json, load, machine, parser, records_of, settings_of, versions

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, perplexity
from easyedit_rls.anchors.cache import moments


def measure(args: argparse.Namespace, source: str, tolerance: float, n_texts: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"mom2_dataset": source, "mom2_tolerance": tolerance}
    settings |= {} if n_texts is None else {"mom2_n_samples": n_texts}
    settings |= {"layers": args.layers} if args.layers else {}
    model, tok = load(args.model)
    hparams = settings_of(args, model, settings)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["EASYEDIT_RLS_CACHE"] = folder
        begun = time.perf_counter()
        found = moments(model, tok, hparams, show_progress=True)
        seconds = time.perf_counter() - begun
        print(f"{source}, tolerance {hparams.mom2_tolerance}: {seconds:.1f} s", file=sys.stderr)
        result = {
            "source": Path(source).name,
            "tolerance": hparams.mom2_tolerance,
            "seconds": seconds,
            "tokens": max(moment.n_tokens for moment in found.values()),
            "error": max(moment.error for moment in found.values()),
        }
        if args.data:
            records = records_of(args)
            editor = RLSEditor(model, tok, hparams, show_progress=False)
            for start in range(0, len(records), args.batch):
                editor.edit(records[start : start + args.batch])
            result["after_the_edits"] = evaluate(model, tok, records).means()
            result["perplexity"] = perplexity(model, tok, args.text.read_text(encoding="utf-8"))
    return result


def main() -> None:
    names = ("model", "hparams", "layers", "data", "text", "first", "count", "batch", "threads")
    options = parser(__doc__, *names, data=None, text=None, count=100, batch=20)
    options.add_argument(
        "--sources",
        nargs="+",
        default=["shipped"],
        help="what to take the moments from (default: %(default)s)",
    )
    shipped = RLSEditHyperParams.__dataclass_fields__["mom2_tolerance"].default
    options.add_argument(
        "--tolerances",
        type=float,
        nargs="+",
        default=[shipped],
        help="where to stop reading (default: %(default)s)",
    )
    options.add_argument(
        "--texts",
        type=int,
        help="how many texts to read to the end, for each source (default: the settings' number)",
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    readings: list[tuple[float, int | None]] = [(tolerance, None) for tolerance in args.tolerances]
    readings += [] if args.texts == 0 else [(0.0, args.texts)]
    results = [measure(args, source, *reading) for source in args.sources for reading in readings]
    print(as_json({"results": results, "versions": versions(), "machine": machine()}))


if __name__ == "__main__":
    main()
