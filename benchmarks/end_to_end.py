"""Seconds an edit, against EasyEdit's AlphaEdit in the same process, batch by batch in turn; prints one JSON
object.

    EASYEDIT_HOME=CHECKOUT python benchmarks/end_to_end.py --model models/smollm2-135m \
        --data pararel_dev.json --threads 1

Seven editors take the same records in turns, each on a model of its own:
  peer      AlphaEdit of the checkout (without one, a plain loop that works as it does, and the
            output says so)
  plain     RLSEdit with the peer's value settings: its Adam (momentum 0.9, rate 0.5), 25 steps, the same
            clamp, KL weight and five templates, and the only stopping rule that AlphaEdit has, which can't be
            switched off: a loss below 0.05
  same      the same, but texts whose target has an NLL below 0.1 nats run at every third step only
            (`settled_nll`)
  fewer     as same, with our step rule: a momentum of 0.5 and a rate of 0.7, and `--steps` of them
  defaults  RLSEdit as shipped
  plain-bfloat16, defaults-bfloat16
            as plain and defaults, the values optimized on a copy in bfloat16 (`v_dtype`)
All edit the same layers. Preparation is left out on all sides: moments, projections, templates. The losses
are those of the values at the last step (with bfloat16 as the copy sees them). From the second batch on the
edited models differ, so before the peer edits a batch, the values of others with its settings are optimized
on its own model too, off the clock, and their losses taken there, in its own type
(`loss_to_peer_on_its_model`).
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import as_json, load, machine, parser, records_of, settings_of, spread, versions
from peers import make_peer

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, parse_requests
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.facts.keys import locate_facts
from easyedit_rls.facts.values import losses_at, optimize_values
from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.sampling import sample_templates

THEIR_VALUES = (
    "plain",
    "same",
    "fewer",
    "plain-bfloat16",
)  # what is optimized with the peer's value settings


def prepared(
    model: Any, tok: Any, hparams: RLSEditHyperParams
) -> Callable[[Sequence[EditRequest]], list[float]]:
    """An editor as a function of a batch that returns the final losses; moments and templates are ready."""
    editor = RLSEditor(model, tok, hparams, show_progress=False)
    editor.prepare()
    return lambda requests: [fact.loss for fact in editor.edit(requests).facts]


def losses_on(
    model: Any, tok: Any, hparams: RLSEditHyperParams, requests: Sequence[EditRequest]
) -> list[float]:
    """Final losses of values on a model as it is; it is not edited."""
    facts = locate_facts(tok, requests, hparams.context_templates or ())
    with undisturbed(model):
        layout = find_layout(model, hparams)
        values = optimize_values(model, layout, facts, hparams)
        return losses_at(model, layout, facts, hparams, values.delta).tolist()


def to_peer(losses: dict[str, list[float]], name: str, count: int) -> float:
    """Mean final loss of the first values against the peer's."""
    return statistics.fmean(losses[name][:count]) / statistics.fmean(losses["peer"][:count])


def main() -> None:
    options = parser(
        __doc__, "model", "data", "hparams", "layers", "first", "count", "batch", "device", "threads"
    )
    options.add_argument(
        "--steps", type=int, default=12, help="steps of a value of 'fewer', at most (default: %(default)s)"
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)

    records = records_of(args)
    model, tok = load(args.model, device=args.device)
    shipped = settings_of(args, model, {"layers": args.layers} if args.layers else None).to_dict()
    templates = sample_templates(model, tok, 5, shipped["seed"])
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
    rule = {"v_lr": 0.7, "v_momentum": 0.5, "v_num_grad_steps": args.steps}
    plain = RLSEditHyperParams.from_dict({**shipped, **theirs})
    same = RLSEditHyperParams.from_dict({**shipped, **theirs, "settled_nll": 0.1})
    fewer = RLSEditHyperParams.from_dict({**same.to_dict(), **rule})
    settings = {"plain": plain, "same": same, "fewer": fewer, "defaults": defaults}
    for name in ("plain", "defaults"):
        settings[f"{name}-bfloat16"] = RLSEditHyperParams.from_dict(
            {**settings[name].to_dict(), "v_dtype": "bfloat16"}
        )
    models = {"peer": model, **{name: copy.deepcopy(model) for name in settings}}
    peer = make_peer(models["peer"], tok, plain, templates)
    editors = {
        "peer": peer.edit,
        **{name: prepared(models[name], tok, hparams) for name, hparams in settings.items()},
    }

    requests = parse_requests(records)
    seconds: dict[str, list[float]] = {name: [] for name in editors}
    losses: dict[str, list[float]] = {name: [] for name in editors}
    on_its_model: dict[str, list[float]] = {name: [] for name in THEIR_VALUES}
    for start in range(0, len(requests), args.batch):
        batch = requests[start : start + args.batch]
        for name in THEIR_VALUES:
            on_its_model[name] += losses_on(models["peer"], tok, settings[name], batch)
        for name, edit in editors.items():
            begun = time.perf_counter()
            losses[name] += edit(batch)
            seconds[name].append((time.perf_counter() - begun) / len(batch))
            print(
                f"{name}: {seconds[name][-1]:.2f} s/edit, mean loss {statistics.fmean(losses[name]):.4f}",
                file=sys.stderr,
            )

    ratios = {name: [a / b for a, b in zip(seconds["peer"], seconds[name])] for name in settings}
    result = {
        "peer": peer.name,
        "records": [args.first, args.first + len(records)],
        "layers": shipped["layers"],
        "seconds_per_edit": {name: spread(values) for name, values in seconds.items()},
        "times_faster": {name: spread(values) for name, values in ratios.items()},
        "mean_final_loss": {name: statistics.fmean(values) for name, values in losses.items()},
        "loss_to_peer": {name: to_peer(losses, name, len(requests)) for name in THEIR_VALUES},
        "loss_to_peer_in_the_first_batch": {name: to_peer(losses, name, args.batch) for name in THEIR_VALUES},
        "loss_to_peer_on_its_model": {
            name: to_peer(losses | on_its_model, name, len(requests)) for name in THEIR_VALUES
        },
        "quality": {name: evaluate(model, tok, records).means() for name, model in models.items()},
        "settings": {name: hparams.to_dict() for name, hparams in settings.items()},
        "versions": versions(),
        "machine": {**machine(), "device": args.device},
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
