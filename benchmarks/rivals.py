"""EasyEdit's AlphaEdit or MEMIT on a stream of records, at a tenth of their time, to choose their settings;
prints one JSON object.

    python benchmarks/rivals.py --alg MEMIT --n0 500 --model MODEL --data pararel_dev.json \
        --text wikitext2_test.txt --first 1000

Their values and keys by this package's passes (which give the numbers of `compute_z` and `compute_ks`:
tests/host/test_parity.py), their targets and their way of writing them by the formulas below. Comparisons run
the editors themselves; this is for finding with which settings. `--check` edits the first batch with the
checkout's own editor as well and says how far the weights lie apart.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from common import as_json, load, machine, parser, records_of, settings_of, versions
from torch import Tensor

from easyedit_rls import RLSEditHyperParams, evaluate, parse_requests, perplexity
from easyedit_rls.anchors.cache import moments
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.facts.keys import LayerWalk, locate_facts
from easyedit_rls.facts.values import optimize_values
from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.sampling import sample_templates

_VALUES = {
    "early_stopping": "loss",  # both stop at a loss of 0.05, and can't be told not to
    "v_num_grad_steps": 25,
    "v_momentum": 0.9,
    "v_lr": 0.5,
    "clamp_norm_factor": 0.75,
    "kl_factor": 0.0625,
    "overshoot": 1.0,
    "statements": [],
}


class Rival:
    """AlphaEdit (arXiv 2410.02355, eq. 14: with its history of keys and its projection) or MEMIT (arXiv
    2210.07229, eq. 14).
    """

    def __init__(self, args: argparse.Namespace, model: Any, tok: Any, hp: RLSEditHyperParams) -> None:
        self.alg, self.model, self.tok, self.hparams = args.alg, model, tok, hp
        self.layout = find_layout(model, hp)
        self.L2 = args.L2
        means = {layer: moment.mean.double() for layer, moment in moments(model, tok, hp).items()}
        if self.alg == "MEMIT":
            self.gram = {layer: args.n0 * mean for layer, mean in means.items()}
        else:
            self.projection = {layer: _null_space(mean, args.threshold) for layer, mean in means.items()}
            self.gram = {layer: torch.zeros_like(mean) for layer, mean in means.items()}

    def edit(self, requests: Sequence[EditRequest]) -> None:
        """Edit a batch in place."""
        with undisturbed(self.model):
            facts = locate_facts(self.tok, requests, self.hparams.context_templates)
            z = optimize_values(self.model, self.layout, facts, self.hparams).z
            walk = LayerWalk(self.model, self.layout, facts, self.hparams.batch_tokens)
            for i, (layer, weight) in enumerate(self.layout.edited.items()):
                K = walk.advance_to(layer).double()
                share = ((z - walk.value_states(layer)) / (len(self.layout.edited) - i)).double()
                weight.write((weight.read().double() + self._step(layer, K, share)).float())
            if self.alg == "AlphaEdit":  # which remembers keys as they are after the edit
                walk = LayerWalk(self.model, self.layout, facts, self.hparams.batch_tokens)
                for layer in self.layout.edited:
                    K = walk.advance_to(layer).double()
                    self.gram[layer] += K.T @ K

    def _step(self, layer: int, K: Tensor, share: Tensor) -> Tensor:
        gram = self.gram[layer] + K.T @ K
        if self.alg == "MEMIT":
            return torch.linalg.solve(gram, K.T @ share)
        P = self.projection[layer]
        return torch.linalg.solve(P @ gram + self.L2 * torch.eye(len(P), dtype=P.dtype), P @ K.T @ share)


def _null_space(mean: Tensor, threshold: float) -> Tensor:
    """The projection on the directions in which ordinary keys have a second moment below the threshold."""
    eigenvalues, vectors = torch.linalg.eigh(mean)
    rare = vectors[:, eigenvalues < threshold]
    return rare @ rare.T


def _check(
    args: argparse.Namespace, model: Any, tok: Any, hp: RLSEditHyperParams, requests: Sequence[EditRequest]
) -> dict[str, Any]:
    """How far the weights of one batch lie from those of the checkout's own editor, relative to its step, by
    layer.
    """
    from easyedit_rls.host.builtin import EasyEditBaseline

    layout, own = find_layout(model, hp), copy.deepcopy(model)
    before = {layer: weight.read() for layer, weight in layout.edited.items()}
    changes = (
        {"mom2_update_weight": args.n0}
        if args.alg == "MEMIT"
        else {"L2": args.L2, "nullspace_threshold": args.threshold}
    )
    EasyEditBaseline(args.alg, own, tok, hp, hp.context_templates or (), changes).edit(requests)
    theirs = {layer: weight.read() for layer, weight in find_layout(own, hp).edited.items()}
    Rival(args, model, tok, hp).edit(requests)
    ours = {layer: weight.read() for layer, weight in layout.edited.items()}
    return {
        str(layer): float((ours[layer] - theirs[layer]).norm() / (theirs[layer] - before[layer]).norm())
        for layer in ours
    }


def main() -> None:
    options = parser(
        __doc__,
        "model",
        "data",
        "text",
        "hparams",
        "first",
        "count",
        "batch",
        "threads",
        "set",
        first=1000,
        count=100,
        batch=20,
    )
    options.add_argument("--alg", choices=["AlphaEdit", "MEMIT"], required=True)
    options.add_argument(
        "--n0", type=float, default=500, help="MEMIT's mom2_update_weight (default: %(default)s)"
    )
    options.add_argument("--L2", type=float, default=1.0, help="AlphaEdit's (default: %(default)s)")
    options.add_argument(
        "--threshold", type=float, default=2e-2, help="AlphaEdit's nullspace_threshold (default: %(default)s)"
    )
    options.add_argument(
        "--templates", type=int, default=2, help="texts before prompts (default: %(default)s)"
    )
    options.add_argument(
        "--check",
        action="store_true",
        help="compare with the checkout at EASYEDIT_HOME on the first batch, and stop",
    )
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    records = records_of(args)
    templates = sample_templates(model, tok, args.templates, 0)
    theirs = {**_VALUES, "context_templates": templates}
    hp = settings_of(args, model, theirs)
    requests = parse_requests(records)
    if args.check:
        print(json.dumps({"alg": args.alg, "apart": _check(args, model, tok, hp, requests[: args.batch])}))
        return
    rival = Rival(args, model, tok, hp)
    for start in range(0, len(requests), args.batch):
        rival.edit(requests[start : start + args.batch])
        print(f"{start + args.batch} of {len(requests)}", file=sys.stderr)
    found = evaluate(model, tok, records)
    early = evaluate(model, tok, records[: len(records) // 2])
    result = {
        "alg": args.alg,
        **{name: getattr(args, name) for name in ("n0", "L2", "threshold", "templates", "set")},
        "records": [args.first, args.first + len(records)],
        "after": {
            **found.means(),
            "perplexity": perplexity(model, tok, args.text.read_text(encoding="utf-8"), max_tokens=8192),
        },
        "first_half": early.means(),
        "versions": versions(),
        "machine": machine(),
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
