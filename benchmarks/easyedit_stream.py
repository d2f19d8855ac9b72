"""Edit streams of records through EasyEdit's `batch_edit`, score each again at its end with its own metrics;
prints one JSON object.

    EASYEDIT_HOME=… python benchmarks/easyedit_stream.py --model models/smollm2-135m-llama --data
    pararel_dev.json --streams 5

runs five streams of `--count` records one behind another, each on the unedited model: thirty records differ
much from the next thirty. EasyEdit tells a model's family by its name, hence the folder's. `--alg AlphaEdit
--alpha-hparams FILE.yaml` runs EasyEdit's own editor on the same records instead. The metrics: rewrite_acc
and rephrase_acc (tokens of the target that are the argmax, teacher-forced; the first paraphrase), locality
(tokens of the neighbors' answers whose argmax stayed what it was).
"""

import contextlib
import logging
import sys
import time
from statistics import fmean
from typing import Any

import torch
from common import as_json, parser, records_of, versions
from omegaconf import OmegaConf

import easyedit_rls


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "first", "count", "batch", "set", count=30)
    options.add_argument(
        "--alg", choices=["RLSEdit", "AlphaEdit"], default="RLSEdit", help="default: %(default)s"
    )
    options.add_argument(
        "--streams", type=int, default=1, help="streams of --count records each (default: %(default)s)"
    )
    options.add_argument("--alpha-hparams", help="AlphaEdit's YAML file, for --alg AlphaEdit")
    args = options.parse_args()

    settings_class = easyedit_rls.register()
    import easyeditor

    if args.alg == "AlphaEdit":
        settings_class = easyeditor.AlphaEditHyperParams
    hparams = settings_class.from_hparams(args.hparams if args.alg == "RLSEdit" else args.alpha_hparams)
    overrides = OmegaConf.to_container(OmegaConf.from_dotlist(args.set))
    settings = {**hparams.to_dict(), **overrides, "model_name": args.model, "batch_size": args.batch}
    hparams = settings_class.from_dict(settings) if args.alg == "RLSEdit" else settings_class(**settings)
    streams = []
    for _ in range(args.streams):
        with contextlib.redirect_stdout(sys.stderr):  # EasyEdit prints a lot
            result = run_stream(easyeditor, hparams, records_of(args))
        streams.append({"first": args.first, **result})
        print(streams[-1], file=sys.stderr)
        args.first += args.count
    means = {name: fmean(stream[name] for stream in streams) for name in streams[0] if name != "first"}
    about = {"threads": torch.get_num_threads(), "versions": versions(), "settings": hparams.to_dict()}
    print(as_json({"alg_name": hparams.alg_name, "means": means, "streams": streams, **about}))


def run_stream(easyeditor: Any, hparams: Any, records: list[dict[str, Any]]) -> dict[str, float]:
    """Edit the records in batches of `hparams.batch_size`, then score them all."""
    from easyeditor.editors.editor import finalize_locality_metrics

    logging.getLogger("easyeditor.editors.editor").setLevel(logging.WARNING)
    facts = [record["requested_rewrite"] for record in records]
    true = [fact["target_true"]["str"] for fact in facts]
    near = [record["neighborhood_prompts"] for record in records]
    editor = easyeditor.BaseEditor.from_hparams(hparams)
    start = time.perf_counter()
    metrics, model, _ = editor.batch_edit(
        prompts=[fact["prompt"].replace("{}", fact["subject"]) for fact in facts],
        subject=[fact["subject"] for fact in facts],
        target_new=[fact["target_new"]["str"] for fact in facts],
        ground_truth=true,
        rephrase_prompts=[record["paraphrase_prompts"][0] for record in records],
        locality_inputs={
            "neighborhood": {"prompt": near, "ground_truth": [[t] * len(n) for t, n in zip(true, near)]}
        },
        sequential_edit=True,
        verbose=False,
    )
    total_s = time.perf_counter() - start
    edit_s = sum(metrics[i]["time"] for i in range(0, len(metrics), hparams.batch_size))
    for metric in metrics:
        request = metric["requested_rewrite"]
        metric["post"] = easyeditor.compute_edit_quality(
            model, hparams.model_name, hparams, editor.tok, request, hparams.device
        )
        finalize_locality_metrics(metric, request, hparams, hparams.model_name)
    return {
        "rewrite_acc": fmean(fmean(m["post"]["rewrite_acc"]) for m in metrics),
        "rephrase_acc": fmean(fmean(m["post"]["rephrase_acc"]) for m in metrics),
        "locality": fmean(fmean(m["post"]["locality"]["neighborhood_acc"]) for m in metrics),
        "locality_first_neighbor": fmean(m["post"]["locality"]["neighborhood_acc"][0] for m in metrics),
        "seconds_per_edit": edit_s / len(metrics),
        "seconds_with_evaluation": total_s,
    }


if __name__ == "__main__":
    main()
