"""Seconds to evaluate records, against EasyEdit's `compute_edit_quality` in the same process, in turns;
prints one JSON object.

    EASYEDIT_HOME=CHECKOUT python benchmarks/evaluation.py --model models/smollm2-135m-llama \
        --data pararel_dev.json --threads 2

Both score the same prompts by the same rule (rewrite, rephrase, all neighbors) with the same model, and must
give the same numbers. A turn is all records: in one call here, one call a record there, which is all that
EasyEdit has. In bfloat16 a near tie may fall otherwise where texts run together:
`records_with_another_number_than` says how often it did, and how often either differs from the figures in
float32. EasyEdit loads a model by what its folder is called, so the folder's name must contain the family's,
as in smollm2-llama.
"""

import contextlib
import io
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import as_json, load, machine, parser, settings_of, spread, versions

from easyedit_rls.data.records import read_records
from easyedit_rls.editors.base import EDITORS, Setup
from easyedit_rls.evaluation import edit_quality, evaluate
from easyedit_rls.host.find import easyeditor


def n_unlike(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> int:
    """Records of which some figure differs."""
    return sum(figures(a) != figures(b) for a, b in zip(one, other, strict=True))


def figures(record: Mapping[str, Any]) -> list[list[Any]]:
    found = [record[name] for name in ("rewrite_acc", "rephrase_acc") if name in record] + list(
        record["locality"].values()
    )
    return [[list(x) if isinstance(x, list) else float(x) for x in values] for values in found]


def main() -> None:
    options = parser(
        __doc__, "model", "data", "hparams", "first", "count", "device", "threads", count=200, threads=2
    )
    options.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the model (default: %(default)s)",
    )
    options.add_argument("--repeats", type=int, default=3, help="turns (default: %(default)s)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    package = easyeditor()

    records = read_records(args.data, args.first, args.count)
    model, tok = load(args.model, getattr(torch, args.dtype), args.device)
    tok.pad_token = tok.pad_token or tok.eos_token  # as EasyEdit's own paths have it
    settings = EDITORS.get("FT").begin(Setup(model, tok, settings_of(args, model), [])).settings
    seconds: dict[str, list[float]] = {"EasyEdit": [], "edit_quality": [], "evaluate": []}
    edit_quality(model, tok, [record.easyedit for record in records[:5]])  # warm
    for _ in range(args.repeats):
        begun = time.perf_counter()
        ours = edit_quality(model, tok, [record.easyedit for record in records])
        seconds["edit_quality"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = [
                package.compute_edit_quality(
                    model, settings.model_name, settings, tok, record.easyedit, settings.device
                )
                for record in records
            ]
        seconds["EasyEdit"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        evaluate(model, tok, [record.request for record in records])
        seconds["evaluate"].append(time.perf_counter() - begun)
        print({name: round(values[-1], 2) for name, values in seconds.items()}, file=sys.stderr)
    unlike = {"EasyEdit's": n_unlike(ours, theirs)}
    if args.dtype != "float32":
        true = edit_quality(*load(args.model, device=args.device), [record.easyedit for record in records])
        unlike |= {"in float32": n_unlike(ours, true), "EasyEdit's, in float32": n_unlike(theirs, true)}
    ratios = [a / b for a, b in zip(seconds["EasyEdit"], seconds["edit_quality"])]
    result = {
        "dtype": args.dtype,
        "records": [args.first, args.first + len(records)],
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "times_faster": spread(ratios),
        "records_with_another_number_than": unlike,
        "versions": versions(),
        "machine": {**machine(), "device": args.device},
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
