"""Published files of records: what is read of each, and what some records of each do to a model; prints one
JSON object.

    python benchmarks/record_files.py --model models/smollm2-135m \
        --data counterfact.json zsre.json qaedit.json --threads 2

Of each file: all its records, read and checked. Then `--count` of them from the middle on (the first halves
are for tuning), edited into the unedited model and measured before and after, with EasyEdit's figures for
locality and portability. Locality is the share of answers' tokens that are as before; portability is the
share that is right.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import as_json, load, machine, parser, settings_of, versions

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate
from easyedit_rls._base.progress import progress_bar
from easyedit_rls.data.records import EditRecord, read_file
from easyedit_rls.evaluation import add_locality, edit_quality

_FIGURES = ("rewrite_accuracy", "efficacy", "paraphrase_accuracy", "specificity")


def reading(path: Path) -> dict[str, Any]:
    """How many records a file has, and what is left out of them and why."""
    found = read_file(path, on_bad="skip")
    return {
        "records": found.n_read,
        "edits": len(found.records),
        "formats": dict(found.formats),
        "left_out": dict(Counter(one.reason for one in found.left_out)),
        "unknown_fields": list(found.unknown),
    }


def shares(records: Sequence[Mapping[str, Any]], section: str) -> dict[str, float]:
    """The mean accuracy over records of each of a section's parts, and of all parts of a record together."""
    found: dict[str, list[float]] = {}
    for record in records:
        parts = {
            name.removesuffix("_acc"): fmean(values)
            for name, values in record[section].items()
            if name.endswith("_acc")
        }
        for name, value in (parts | ({"all": fmean(parts.values())} if parts else {})).items():
            found.setdefault(name, []).append(value)
    return {name: fmean(values) for name, values in found.items()}


class Trial:
    """One model, from whose unedited weights every file's records are edited."""

    def __init__(self, model: Any, tok: Any, hparams: RLSEditHyperParams, batch: int) -> None:
        self._model, self._tok, self._hparams, self._batch = model, tok, hparams, batch
        self._unedited = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def run(self, records: Sequence[EditRecord]) -> dict[str, Any]:
        """Edit records, and measure them before and after."""
        self._model.load_state_dict(self._unedited)
        requests, asked = [record.request for record in records], [record.easyedit for record in records]
        first = edit_quality(self._model, self._tok, asked)
        before = {**self._said(records), "portability": shares(first, "portability")}
        with RLSEditor(self._model, self._tok, self._hparams, show_progress=False) as editor:
            for at in range(0, len(requests), self._batch):
                editor.edit(requests[at : at + self._batch])
        last = edit_quality(self._model, self._tok, asked)
        add_locality(first, last)
        after = {
            **self._said(records),
            "portability": shares(last, "portability"),
            "locality": shares(last, "locality"),
        }
        return {"edits": len(records), "before": before, "after": after}

    def _said(self, records: Sequence[EditRecord]) -> dict[str, Any]:
        means = evaluate(
            self._model, self._tok, [record.request for record in records], show_progress=False
        ).means()
        return {name: means[name] for name in _FIGURES}


def main() -> None:
    options = parser(__doc__, "model", "hparams", "set", "count", "batch", "threads", count=20, batch=20)
    options.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="FILE", help="files of records"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    hparams = settings_of(args, model)
    trial = Trial(model, tok, hparams, args.batch)
    files = {}
    with progress_bar(len(args.data), "files", "file", None) as bar:
        for path in args.data:
            read = reading(path)
            used = read_file(path, read["records"] // 2, args.count, on_bad="skip").records
            files[path.name] = {"read": read, "first": read["records"] // 2, **trial.run(used)}
            bar.update(1)
    written = {"files": files, "settings": hparams.to_dict(), "versions": versions(), "machine": machine()}
    print(as_json(written))


if __name__ == "__main__":
    main()
