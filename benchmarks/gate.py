"""What a gated memory costs: time a token for a prompt and for generation, against the unedited model, share
of ordinary tokens that open, and bytes an edit; prints one JSON object.

    python benchmarks/gate.py --model models/smollm2-135m --data counterfact.json --text TEXT.txt

The gates get the keys of as many facts, and weights that a random change was made to: the time depends on
neither. Unedited and gated runs alternate; times are medians, with the least and the largest.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from common import as_json, gate_factors, load, parser, settings_of, spread, versions
from torch import Tensor

from easyedit_rls.anchors.cache import moments
from easyedit_rls.anchors.ordinary import ordinary_keys
from easyedit_rls.data.records import read_records
from easyedit_rls.editors.gated import GatedMemory, behind_gates
from easyedit_rls.facts.keys import LayerWalk, locate_facts
from easyedit_rls.facts.templates import templates_of
from easyedit_rls.model.gate import CLOSED, gate_of, remove_gates
from easyedit_rls.model.layout import find_layout
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares

_PROMPT = 256


def main() -> None:
    options = parser(__doc__, "model", "data", "text", "hparams", "set", "threads", "first")
    options.add_argument("--counts", type=int, nargs="+", default=[100, 1000], help="of edits")
    options.add_argument("--new", type=int, default=64, help="tokens to generate (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    hp = settings_of(args, model, {"keys": "each", "memory": "gated"})
    layout = find_layout(model, hp)
    layer, known = hp.layers[0], moments(model, tok, hp)
    requests = [record.request for record in read_records(args.data, args.first, max(args.counts))]
    facts = locate_facts(tok, requests, templates_of(model, tok, hp), hp.statements)
    walk = LayerWalk(model, layout, facts, hp.batch_tokens, "each")
    K, moment = walk.advance_to(layer), known[layer].mean
    sample = ordinary_keys(model, tok, layout, layer, hp)
    ids = tok(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    prior = Prior(torch.zeros(K.shape[-1], 1, dtype=torch.float64), hp.mom2_update_weight * moment)
    start = RecursiveLeastSquares(prior)
    found = {}
    for count in args.counts:
        solver = start.update(K[:count], torch.zeros(count, K.shape[1], 1), walk.importance[:count])
        edited = behind_gates(layout.edited)
        decision = GatedMemory(edited).decision
        decision.factors = gate_factors(start, solver, hp.gate_prior)
        decision.threshold = float(torch.quantile(decision.leverage(sample).double(), 1 - hp.gate_share))
        for weight in edited.values():
            weight.write(weight.read() * 1.01)
        figures = times(model, ids, decision, args.new, args.rounds)
        shares = []
        for at in range(0, 64 * _PROMPT, _PROMPT):
            with torch.no_grad():
                model.base_model(ids[:, at : at + _PROMPT])
            shares.append(float(decision.open.float().mean()))  # type: ignore[union-attr]
        n_bytes = decision.factors.nbytes + sum(gate_of(w.module).weight.nbytes for w in edited.values())
        figures |= {"share_open": statistics.fmean(shares), "threshold": decision.threshold}
        found[str(count)] = {**figures, "bytes": n_bytes, "bytes_an_edit": n_bytes / count}
        remove_gates(model)
    print(as_json({"edits": found, "gate_share": hp.gate_share, "threads": args.threads, **versions()}))


def times(model: Any, ids: Tensor, decision: Any, new: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a token, unedited (the gate's hooks taken off) and gated, alternating."""
    threshold, hooks = decision.threshold, [(module, module._forward_hooks) for module in model.modules()]
    prompt = ids[:, :_PROMPT]
    seen: dict[str, list[float]] = {}

    def generate() -> None:
        length = {"max_new_tokens": new, "min_new_tokens": new}
        model.generate(prompt[:, :32], do_sample=False, pad_token_id=0, **length)

    def read() -> None:
        with torch.no_grad():
            model(prompt)

    for number in range(rounds + 1):
        for kind in ("unedited", "gated"):
            for module, own in hooks:
                module._forward_hooks = type(own)() if kind == "unedited" else own
            decision.threshold = CLOSED if kind == "unedited" else threshold
            for what, call, n in (("generation", generate, new), ("prompt", read, _PROMPT)):
                took = clocked(call) / n
                if number > 0:  # the first round warms up
                    seen.setdefault(f"{what}_{kind}", []).append(took)
    ratios = {
        f"{what}_ratio": [g / u for g, u in zip(seen[f"{what}_gated"], seen[f"{what}_unedited"])]
        for what in ("generation", "prompt")
    }
    return {name: spread(values) for name, values in {**seen, **ratios}.items()}


def clocked(call: Callable[[], None]) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
