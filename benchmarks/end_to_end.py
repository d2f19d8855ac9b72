"""Seconds an edit, against EasyEdit's AlphaEdit in the same process, batch by batch in turn; prints one JSON object.

    EASYEDIT_HOME=CHECKOUT python benchmarks/end_to_end.py --model models/smollm2-135m --data pararel_dev.json --threads 1

Four editors take the same records in turns, each on a model of its own:
  peer      AlphaEdit of the checkout (without one, a plain loop that works as it does, and the output says so)
  plain     RLSEdit with the peer's values to the letter: below, and its Adam (momentum 0.9, rate 0.5) for as many as 25 steps
  same      RLSEdit with the peer's value settings: 25 steps, the same clamp, KL weight and five templates, and the only stopping
            rule that AlphaEdit has, which can't be switched off: a loss below 0.05. Its own are the step rule (Adam with a
            momentum of 0.5 and a rate of 0.7, theirs 0.9 and 0.5) and that texts whose target has an NLL below 0.1 nats run at
            every third step only (`settled_nll`). `--steps` gives it fewer than 25
  defaults  RLSEdit as shipped
All edit the same layers. Preparation is left out on all sides: moments, projections, templates.
The losses are those of the values at the last step.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import load, machine, parser, records_of, spread, versions
from peers import make_peer

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, parse_requests
from easyedit_rls.model.sampling import sample_templates
from easyedit_rls.requests import EditRequest


def prepared(model: Any, tok: Any, hparams: RLSEditHyperParams) -> Callable[[Sequence[EditRequest]], list[float]]:
    """An editor as a function of a batch that returns the final losses; moments and templates are ready."""
    editor = RLSEditor(model, tok, hparams, show_progress=False)
    editor.prepare()
    return lambda requests: [fact.loss for fact in editor.edit(requests).facts]


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "layers", "first", "count", "batch", "threads")
    options.add_argument("--steps", type=int, default=25, help="steps of a value with the peer's settings, at most (default: %(default)s)")
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    shipped = RLSEditHyperParams.from_hparams(args.hparams).to_dict()
    shipped["layers"] = args.layers or shipped["layers"]
    records = records_of(args)
    model, tok = load(args.model)
    models = {"peer": model, **{name: copy.deepcopy(model) for name in ("plain", "same", "defaults")}}
    templates = sample_templates(models["peer"], tok, 5, shipped["seed"])
    defaults = RLSEditHyperParams.from_dict(shipped)
    theirs = {
        "early_stopping": "loss",
        "v_num_grad_steps": 25,
        "clamp_norm_factor": 0.75,
        "kl_factor": 0.0625,
        "v_lr": 0.5,
        "v_momentum": 0.9,
        "overshoot": 1.0,
        "statements": [],
        "context_templates": templates,
    }
    rule = {"v_lr": 0.7, "v_momentum": 0.5, "settled_nll": 0.1, "v_num_grad_steps": args.steps}
    same = RLSEditHyperParams.from_dict({**shipped, **theirs, **rule})
    plain = RLSEditHyperParams.from_dict({**shipped, **theirs})
    peer = make_peer(models["peer"], tok, plain, templates)
    editors = {
        "peer": peer.edit,
        "plain": prepared(models["plain"], tok, plain),
        "same": prepared(models["same"], tok, same),
        "defaults": prepared(models["defaults"], tok, defaults),
    }

    requests = parse_requests(records)
    seconds: dict[str, list[float]] = {name: [] for name in editors}
    losses: dict[str, list[float]] = {name: [] for name in editors}
    for start in range(0, len(requests), args.batch):
        batch = requests[start : start + args.batch]
        for name, edit in editors.items():
            begun = time.perf_counter()
            losses[name] += edit(batch)
            seconds[name].append((time.perf_counter() - begun) / len(batch))
            print(f"{name}: {seconds[name][-1]:.2f} s/edit, mean loss {statistics.fmean(losses[name]):.4f}", file=sys.stderr)

    ratios = {name: [a / b for a, b in zip(seconds["peer"], seconds[name])] for name in ("plain", "same", "defaults")}
    result = {
        "peer": peer.name,
        "records": [args.first, args.first + len(records)],
        "layers": shipped["layers"],
        "seconds_per_edit": {name: spread(values) for name, values in seconds.items()},
        "times_faster": {name: spread(values) for name, values in ratios.items()},
        "mean_final_loss": {name: statistics.fmean(values) for name, values in losses.items()},
        "loss_to_peer": {name: statistics.fmean(losses[name]) / statistics.fmean(losses["peer"]) for name in ("plain", "same")},
        "quality": {name: evaluate(model, tok, records).means() for name, model in models.items()},
        "settings": {"plain": plain.to_dict(), "same": same.to_dict(), "defaults": defaults.to_dict()},
        "versions": versions(),
        "machine": machine(),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
