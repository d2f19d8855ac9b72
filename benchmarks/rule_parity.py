"""How far one batch by a rule of this package lies from the same batch by EasyEdit's own editor, layer by
layer; prints one JSON object.

    EASYEDIT_HOME=CHECKOUT python benchmarks/rule_parity.py --model MODEL --data counterfact.json --count 4

Both get the same facts, templates, second moments and value settings: those that EasyEdit's editors can't be
told to leave (a loss of 0.05 ends an optimization, no momentum of one's own). Numbers are relative to the
checkout's step.
"""

import copy
import os
from typing import Any

import torch
from common import as_json, load, parser, records_of, settings_of, versions

from easyedit_rls import RLSEditHyperParams, RLSEditor, parse_requests
from easyedit_rls.editors.base import EDITORS, Setup
from easyedit_rls.model.layout import find_layout

_VALUES = {
    "early_stopping": "loss",
    "v_num_grad_steps": 25,
    "v_momentum": 0.9,
    "v_lr": 0.5,
    "clamp_norm_factor": 0.75,
    "kl_factor": 0.0625,
    "overshoot": 1.0,
    "statements": [],
    "keys": "mean",
    "value_at": "hidden",
    "settled_nll": 0.0,
    "max_deviation": "off",
    "context_templates": ["The weather was fine. ", "In the morning we met. "],
}
_NULL = {"L2": 10.0, "threshold": 2e-2}
_PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # ours, and the checkout's settings
    "MEMIT": ({"solver": "memit", "solver_settings": {"n_0": 500}}, {"mom2_update_weight": 500}),
    "EMMET": (
        {"solver": "emmet", "solver_settings": {"n_0": 500, "ridge": 0.1}},
        {"mom2_update_weight": 500, "emmet_lambda": 0.1, "update_norm_lambda": 0},
    ),
    "AlphaEdit": (
        {"solver": "alphaedit", "solver_settings": _NULL},
        {"L2": 10.0, "nullspace_threshold": 2e-2},
    ),
    "SPHERE": (
        {"solver": "alphaedit-sphere", "solver_settings": _NULL},
        {"L2": 10.0, "nullspace_threshold": 2e-2, "cumulative_ratio": 0.5, "suppression_strength": 0.5},
    ),
    "MEMIT-FE": (
        {"solver": "memit", "solver_settings": {"n_0": 500}, "targets": "first_layer"},
        {"mom2_update_weight": 500},
    ),
}


def main() -> None:
    options = parser(
        __doc__, "model", "data", "hparams", "first", "count", "threads", "set", first=0, count=4
    )
    options.add_argument("--only", nargs="*", default=list(_PAIRS), choices=list(_PAIRS))
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    hparams = settings_of(args, model, _VALUES)
    requests = parse_requests(records_of(args))
    result: dict[str, Any] = {"records": [args.first, args.first + args.count], "apart": {}}
    for name in args.only:
        ours, theirs = _PAIRS[name]
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        before = {layer: weight.read() for layer, weight in find_layout(model, hparams).edited.items()}
        settings = RLSEditHyperParams.from_dict({**hparams.to_dict(), **ours})
        RLSEditor(one, tok, settings, show_progress=False).edit(requests)
        setup = Setup(other, tok, hparams, hparams.context_templates or (), theirs)
        EDITORS.get(name).begin(setup).edit(requests)
        steps = [
            {
                layer: weight.read() - before[layer]
                for layer, weight in find_layout(each, hparams).edited.items()
            }
            for each in (one, other)
        ]
        result["apart"][name] = {
            str(layer): float((steps[0][layer] - steps[1][layer]).norm() / steps[1][layer].norm())
            for layer in before
        }
    print(as_json({**result, "versions": versions(), "easyedit": bool(os.environ.get("EASYEDIT_HOME"))}))


if __name__ == "__main__":
    main()
