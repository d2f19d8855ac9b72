"""What a memory beside the model costs: time a token for a prompt and for generation, bytes an edit, and for
the gate the share of ordinary tokens that open; `memory: gated`, MEMOIR and facts in front of the prompt
against the unedited model. Prints one JSON object.

    python benchmarks/memories.py --model models/smollm2-135m --data counterfact.json --text TEXT.txt

Each memory knows the keys, masks or texts of as many facts, the gated one in shards. Its weights have a
random change, since time depends on which tokens are open and not on what was learned. `open` generates
behind an edited prompt, `generation` behind plain text, `prompt` reads 256 tokens of it; facts in front come
with the first alone. All take turns; times are milliseconds a token, medians with the least and the largest.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from common import as_json, gate_factors, load, machine, parser, settings_of, spread, versions
from torch import Tensor

from easyedit_rls.anchors.cache import moments
from easyedit_rls.anchors.ordinary import ordinary_keys
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.records import read_records
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import Setup
from easyedit_rls.editors.gated import GatedMemory, behind_gates
from easyedit_rls.editors.in_context import InContext
from easyedit_rls.editors.memoir import MEMOIR
from easyedit_rls.facts.keys import LayerWalk, locate_facts
from easyedit_rls.facts.templates import templates_of
from easyedit_rls.model.gate import gate_of
from easyedit_rls.model.layout import find_layout
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares

_WINDOW = 256
_ONE_PASS = 32  # prompts whose masks are made at once


@dataclass
class Contender:
    """A model with a memory, what it is asked behind edits, and what it costs."""

    model: Any
    asked: Tensor
    n_bytes: int = 0
    more: dict[str, float] = field(default_factory=dict)


def main() -> None:
    options = parser(__doc__, "model", "data", "text", "hparams", "set", "threads", "first")
    options.add_argument("--counts", type=int, nargs="+", default=[100, 1000], help="of edits")
    options.add_argument("--shard", type=int, default=200, help="edits of a shard (default: %(default)s)")
    options.add_argument("--new", type=int, default=64, help="tokens to generate (default: %(default)s)")
    options.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    hp = settings_of(args, model, {"keys": "each", "memory": "gated"})
    records = read_records(args.data, args.first, max(args.counts))
    requests = [record.request for record in records]
    text = tok(args.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    known = Gates(model, tok, hp, requests)
    found = {}
    for count in args.counts:
        asked = tok(requests[count - 1].prompt, return_tensors="pt").input_ids
        contenders = {
            "unedited": Contender(model, asked),
            "gated": gated(known, model, asked, text, count, args.shard),
            "MEMOIR": memoir(model, tok, hp, requests[:count], asked),
            "in context": in_context(model, tok, hp, requests[:count]),
        }
        figures = times(contenders, text, args.new, args.rounds)
        for name, one in contenders.items():
            figures[name] |= {"bytes": one.n_bytes, "bytes_an_edit": one.n_bytes / count, **one.more}
        found[str(count)] = figures
    settings = {
        "gate_share": hp.gate_share,
        "edits_a_shard": args.shard,
        "threads": args.threads,
        "new": args.new,
    }
    print(as_json({"edits": found, **settings, "machine": machine(), **versions()}, depth=3))


class Gates:
    """Keys of all facts at the gate's layer, and what a gate over some of them needs."""

    def __init__(self, model: Any, tok: Any, hp: RLSEditHyperParams, requests: Sequence[EditRequest]) -> None:
        self.hp, self.layout, layer = hp, find_layout(model, hp), hp.layers[0]
        moment = moments(model, tok, hp)[layer].mean
        facts = locate_facts(tok, requests, templates_of(model, tok, hp), hp.statements)
        walk = LayerWalk(model, self.layout, facts, hp.batch_tokens, "each")
        self.keys, self.importance = walk.advance_to(layer), walk.importance
        self.ordinary = ordinary_keys(model, tok, self.layout, layer, hp)
        d_k = self.keys.shape[-1]
        prior = Prior(torch.zeros(d_k, 1, dtype=torch.float64), hp.mom2_update_weight * moment)
        self.start = RecursiveLeastSquares(prior)

    def factors(self, count: int, per_shard: int) -> list[Tensor]:
        """Of a gate that knows the first facts: the prior's, and one a shard."""
        found: list[Tensor] = []
        for at in range(0, count, per_shard):
            keys, importance = (
                each[at : min(at + per_shard, count)] for each in (self.keys, self.importance)
            )
            now = self.start.update(keys, torch.zeros(*keys.shape[:-1], 1), importance)
            prior, own = gate_factors(self.start, now, self.hp.gate_prior).chunk(2, 1)
            found += [own] if found else [prior, own]
        return found


def gated(known: Gates, model: Any, asked: Tensor, text: Tensor, count: int, per_shard: int) -> Contender:
    """A copy behind gates that open at the first facts, and its share of open tokens in a text."""
    model, hp = deepcopy(model), known.hp
    edited = behind_gates(find_layout(model, hp).edited)
    decision = GatedMemory(edited).decision
    factors = known.factors(count, per_shard)
    decision.factors = torch.cat(factors, 1)
    decision.threshold = float(torch.quantile(decision.leverage(known.ordinary).double(), 1 - hp.gate_share))
    for weight in edited.values():
        weight.write(weight.read() * 1.01)
        weight.hold_full([weight.read()] * (len(factors) - 2))
    weights = [W for one in edited.values() for W in (*gate_of(one.module).full, one.parameter)]
    n_bytes = decision.factors.nbytes + sum(W.nbytes for W in weights)
    shares = []
    for at in range(0, 64 * _WINDOW, _WINDOW):
        with torch.no_grad():
            model.base_model(text[:, at : at + _WINDOW])
        assert decision.open is not None
        shares.append(float((decision.open > 0).float().mean()))
    figures = {"shards": len(factors) - 1, "threshold": decision.threshold}
    return Contender(model, asked, n_bytes, {"share_open": statistics.fmean(shares), **figures})


def memoir(
    model: Any, tok: Any, hp: RLSEditHyperParams, requests: Sequence[EditRequest], asked: Tensor
) -> Contender:
    """A copy with MEMOIR's memory, with masks of these facts."""
    editor = MEMOIR(Setup(deepcopy(model), tok, hp, (), {"irr_threshold": 0.5}))
    memory = editor.masked
    prompts = [tok(request.prompt).input_ids for request in requests]
    parts = [prompts[at : at + _ONE_PASS] for at in range(0, len(prompts), _ONE_PASS)]
    memory.masks = torch.cat([memory.masks_of(editor.features(part)) for part in parts])
    memory.weight.data.normal_(0, 1e-4, generator=torch.Generator().manual_seed(0))
    kept = (memory.weight, memory.masks, memory.permutation, memory.background)
    return Contender(editor.model, asked, sum(one.nbytes for one in kept))


def in_context(model: Any, tok: Any, hp: RLSEditHyperParams, requests: Sequence[EditRequest]) -> Contender:
    """The unedited model, asked with the fact in front."""
    editor = InContext(Setup(model, tok, hp, (), {}))
    editor.edit(requests)
    prompt = requests[-1].prompt
    ids = tok(editor.in_front(prompt) + prompt, return_tensors="pt").input_ids
    return Contender(model, ids, sum(one.nbytes for one in editor.memory().values()))


def times(contenders: dict[str, Contender], text: Tensor, new: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds a token of each, taking turns, and their ratios to the unedited model's."""
    seen: dict[str, dict[str, list[float]]] = {name: {} for name in contenders}
    for number in range(rounds + 1):
        for name, one in contenders.items():
            for what, (call, n_tokens) in uses(one, text, new).items():
                took = clocked(call) / n_tokens
                if number > 0:  # the first round warms up
                    seen[name].setdefault(what, []).append(took)
    figures: dict[str, dict[str, Any]] = {}
    for name, taken in seen.items():
        figures[name] = {f"{what}_ms": spread(values) for what, values in taken.items()}
        for what, values in taken.items():
            ratios = [mine / theirs for mine, theirs in zip(values, seen["unedited"][what])]
            figures[name][f"{what}_ratio"] = spread(ratios)
    return figures


def uses(one: Contender, text: Tensor, new: int) -> dict[str, tuple[Callable[[], None], int]]:
    """What is timed: calls, and how many tokens each stands for."""

    def generate(prompt: Tensor) -> None:
        length = {"max_new_tokens": new, "min_new_tokens": new}
        one.model.generate(prompt, do_sample=False, pad_token_id=0, **length)

    def read() -> None:
        with torch.no_grad():
            one.model(text[:, :_WINDOW])

    return {
        "open": (lambda: generate(one.asked), new),
        "generation": (lambda: generate(text[:, :32]), new),
        "prompt": (read, _WINDOW),
    }


def clocked(call: Callable[[], None]) -> float:
    """Milliseconds."""
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
