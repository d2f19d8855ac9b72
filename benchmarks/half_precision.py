"""What a LoRA adapter of a ledger keeps of the edits to a model in half precision; prints one JSON object.

    python benchmarks/half_precision.py --model models/smollm2-135m --data pararel_dev.json --threads 2

For each type and each setting of `keys`: edits the records in batches, with a ledger, exports the adapter as
`easyedit-rls state export --lora` does, and merges it by PEFT into the unedited model of that type. Told are,
of each layer: the rank that leaves out no more than 1e-3 of its change, for the ledger's master weights, of
which the adapter is made, and for the model's rounded weights; the adapter's error against the master's;
and how far the merged weights are from the edited model's own, in spacings of the type's numbers there. And
of the unedited, the edited and the merged model: what they say.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import as_json, load, machine, parser, settings_of, versions
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from easyedit_rls import EditRequest, RLSEditor, evaluate
from easyedit_rls.data.records import read_records
from easyedit_rls.ledger.export import AdapterReport, write_adapter
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_manifest, read_moment
from easyedit_rls.model.layout import Layout, find_layout
from easyedit_rls.model.weights import EditedWeight

_LEFT_OUT = 1e-3  # of a change's norm, as `state export` has it
_FIGURES = ("rewrite_accuracy", "efficacy", "paraphrase_accuracy", "specificity")


class Kind(NamedTuple):
    """Type of the model, and the setting `keys`."""

    dtype: torch.dtype
    keys: str


def rank_of(change: Tensor) -> int:
    """The smallest rank that leaves out no more than 1e-3 of a change's norm, (d_k, d_v), float64."""
    left_out = torch.linalg.svdvals(change).square().flip(0).cumsum(0).flip(0).sqrt()
    return int((left_out > _LEFT_OUT * left_out[0]).sum())


def spacing(like: Tensor) -> Tensor:
    """Distance between neighboring numbers of a tensor's type at its magnitudes, of its shape, float64."""
    tiny = torch.finfo(like.dtype).tiny
    exponent = like.double().abs().clamp(min=tiny).log2().floor()
    return torch.finfo(like.dtype).eps * exponent.exp2()


def adapter_changes(folder: Path, edited: Mapping[int, EditedWeight]) -> dict[int, Tensor]:
    """What an adapter adds to each edited weight, layer -> (d_k, d_v), float64."""
    tensors = load_file(folder / "adapter_model.safetensors")
    added = {}
    for layer, weight in edited.items():
        name = f"base_model.model.{weight.parameter_name.removesuffix('.weight')}"
        A, B = (tensors[f"{name}.lora_{part}.weight"].double() for part in "AB")
        added[layer] = (B @ A).T
    return added


def edit(args: argparse.Namespace, requests: Sequence[EditRequest], folder: Path, kind: Kind) -> RLSEditor:
    """The model of that type in a closed editor, edited in batches, with a ledger in a folder."""
    model, tok = load(args.model, kind.dtype)
    hparams = settings_of(args, model, {"keys": kind.keys})
    with RLSEditor(model, tok, hparams, state_dir=folder, show_progress=False) as editor:
        for at in range(0, len(requests), args.batch):
            editor.edit(requests[at : at + args.batch])
    return editor


def by_layer(moment: Moment, editor: RLSEditor, merged: Layout, adapter: Path) -> dict[int, dict[str, float]]:
    """Figures of each edited layer."""
    added, rows = adapter_changes(adapter, editor.layout.edited), {}
    for layer, weight in editor.layout.edited.items():
        W_0 = moment.unedited[layer].double()
        change = moment.weight(layer).double() - W_0
        ours, theirs = weight.oriented(), merged.edited[layer].oriented()
        apart = (ours.double() - theirs.double()).abs()
        unit = spacing(torch.maximum(ours.abs(), theirs.abs()))
        rows[layer] = {
            "deviation": float(change.norm() / W_0.norm()),
            "rank": rank_of(change),
            "rank_of_rounded": rank_of(ours.double() - W_0),
            "adapter_error": float((added[layer] - change).norm() / change.norm()),
            "rounding_error": float((ours.double() - W_0 - change).norm() / change.norm()),
            "merged_largest_difference": float(apart.max()),
            "merged_largest_difference_spacings": float((apart / unit).max()),
            "merged_share_that_differs": float((apart > 0).double().mean()),
            "merged_share_beyond_one_spacing": float((apart > unit).double().mean()),
            "merged_error": float((theirs.double() - W_0 - change).norm() / change.norm()),
        }
    return rows


def measure(args: argparse.Namespace, requests: Sequence[EditRequest], kind: Kind) -> dict[str, Any]:
    """All figures of one type and one setting."""

    def said(model: Any, tok: Any) -> dict[str, float | None]:
        means = evaluate(model, tok, requests, show_progress=False).means()
        return {name: means[name] for name in _FIGURES}

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        editor = edit(args, requests, folder / "ledger", kind)
        journal = latest(folder / "ledger")
        assert journal is not None
        moment = read_moment(journal)
        report: AdapterReport = write_adapter(folder / "adapter", read_manifest(journal), moment, None)
        base, tok = load(args.model, kind.dtype)
        before = said(base, tok)
        merged = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
        rows = by_layer(moment, editor, find_layout(merged, editor.hparams), folder / "adapter")
        return {
            "adapter": {"rank": report.rank, "bytes": report.n_bytes},
            "layers": rows,
            "unedited": before,
            "edited": said(editor.model, tok),
            "merged": said(merged, tok),
        }


def main() -> None:
    names = ("model", "data", "hparams", "set", "first", "count", "batch", "threads")
    options = parser(__doc__, *names, model="models/smollm2-135m", count=10, batch=5)
    some: dict[str, Any] = {"nargs": "+"}
    dtypes, keys = ("bfloat16", "float16"), ("mean", "each")
    options.add_argument("--dtypes", **some, choices=dtypes, default=dtypes, help="default: both")
    options.add_argument("--keys", **some, choices=keys, default=keys, help="the setting (default: both)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    requests = [record.request for record in read_records(args.data, args.first, args.count)]
    found: dict[str, Any] = {}
    for dtype in args.dtypes:
        for keys in args.keys:
            figures = measure(args, requests, Kind(getattr(torch, dtype), keys))
            found.setdefault(dtype, {})[keys] = figures
            print(dtype, keys, figures["adapter"], figures["edited"], figures["merged"], file=sys.stderr)
    result = {
        "records": [args.first, args.first + len(requests)],
        "data": args.data.name,
        "model": Path(args.model).name,
        "settings": args.hparams,
        "batch": args.batch,
        "found": found,
        "versions": versions(),
        "machine": machine(),
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
