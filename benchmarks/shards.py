"""What shards do for a gated memory, by the unedited model's keys; prints one JSON object.

    python benchmarks/shards.py --model MODEL --hparams smollm2-135m-gated --data counterfact.json --first 0
        --count 1000 --shards 1 2 4 8

The records are cut into so many shards, in order. Told of the edits' own prompts and of their paraphrases, at
the subject's last token:

    routed     share whose largest leverage, at the first edited layer, is that of their own shard
    leverage   in it, and the largest in another one, means
    own        what a layer's least squares makes of the fact's own target there, the mean over layers of
               k A_s⁻¹ Σ D k_own; 1 is all of it
    others     the same of all other facts' targets, as if these were of one length and of directions of their
               own: root of the sum of squares, mean over layers
    fill       of the fullest layer, mean over shards

Nothing is edited: all of that depends on keys alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from common import as_json, load, parser, settings_of, versions
from torch import Tensor

from easyedit_rls.anchors.cache import moments
from easyedit_rls.data.records import read_records
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.facts.keys import LayerWalk, locate_facts
from easyedit_rls.facts.templates import templates_of
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.staged import StagedRows
from easyedit_rls.model.subject import tokenize_fact

KINDS = ("edits", "paraphrases")


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "set", "layers", "first", "count", "threads")
    options.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4, 8], help="default: %(default)s")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    hp = settings_of(args, model, {"keys": "each"})
    hp = hp if args.layers is None else replace(hp, layers=args.layers)
    layout = find_layout(model, hp)
    requests = [record.request for record in read_records(args.data, args.first, args.count)]
    known = moments(model, tok, hp)
    facts = locate_facts(tok, requests, templates_of(model, tok, hp), hp.statements)
    walk = LayerWalk(model, layout, facts, hp.batch_tokens, "each")
    asked = [(i, row) for i, request in enumerate(requests) for row in paraphrase_rows(tok, request)]
    staged = StagedRows(model, layout, [row for _, row in asked], hp.batch_tokens)
    facts_of = {"edits": torch.arange(len(facts)), "paraphrases": torch.tensor([i for i, _ in asked])}
    found: dict[str, dict[str, Any]] = {str(n): {} for n in args.shards}
    layers: dict[str, list[dict[str, float]]] = {str(n): [] for n in args.shards}
    for layer in hp.layers:
        with torch.no_grad():
            K = walk.advance_to(layer).double()
            probes = {
                "edits": K[:, 0],
                "paraphrases": staged.last_states(layout.edited[layer].module, True, layer).double(),
            }
        A_0 = hp.mom2_update_weight * known[layer].mean.double()
        for n in args.shards:
            cuts = [len(facts) * i // n for i in range(n + 1)]
            parts = [(K[a:b], walk.importance[a:b].double()) for a, b in pairwise(cuts)]
            shard_of = torch.repeat_interleave(torch.arange(n), torch.tensor(cuts).diff())
            if layer == hp.layers[0]:
                g = {kind: leverages(A_0 * hp.gate_prior, parts, X) for kind, X in probes.items()}
                found[str(n)] |= {kind: routing(g[kind], shard_of[facts_of[kind]]) for kind in KINDS}
            layers[str(n)].append(responses(A_0, parts, probes, facts_of, shard_of, cuts))
    for n, rows in layers.items():
        for kind in KINDS:
            found[n][kind] |= {
                name: fmean(row[f"{kind} {name}"] for row in rows) for name in ("own", "others")
            }
        found[n]["fill"] = max(row["fill"] for row in rows)
    print(as_json({"shards": found, "facts": len(facts), "n_0": hp.mom2_update_weight, **versions()}))


def paraphrase_rows(tok: Any, request: EditRequest) -> list[list[int]]:
    """Token ids of each paraphrase up to the subject's last one; of those that name it."""
    rows = []
    for text in request.paraphrases:
        before, subject, after = text.rpartition(request.subject)
        if subject:
            row = tokenize_fact(tok, before, subject, after or " is", request.target)
            rows.append(list(row.ids[: row.place + 1]))
    return rows


def leverages(A_0: Tensor, parts: Sequence[tuple[Tensor, Tensor]], X: Tensor) -> Tensor:
    """g of keys in each shard, (keys, shards)."""
    before = variances(torch.linalg.inv(A_0), X)
    after = [variances(torch.linalg.inv(A_0 + information(*part)), X) for part in parts]
    return 1 - torch.stack(after, 1) / before[:, None]


def responses(
    A_0: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    probes: dict[str, Tensor],
    facts_of: dict[str, Tensor],
    shard_of: Tensor,
    cuts: Sequence[int],
) -> dict[str, float]:
    """`own` and `others` of each kind, and fill, at one layer."""
    own: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    others: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    fills = []
    for number, (K, D) in enumerate(parts):
        A = A_0 + information(K, D)
        M = torch.linalg.solve(
            A, (D[..., None] * K).sum(1).T
        )  # (d_k, facts): all rows of a fact have one target
        fills.append(1 - float(torch.linalg.solve(A, A_0).trace()) / len(A))
        for kind in KINDS:
            mine = shard_of[facts_of[kind]] == number
            R = probes[kind][mine] @ M
            at = (facts_of[kind][mine] - cuts[number])[:, None]
            own[kind].append(R.gather(1, at).squeeze(1))
            others[kind].append(R.scatter(1, at, 0.0).square().sum(1).sqrt())
    told = {f"{kind} own": float(torch.cat(own[kind]).mean()) for kind in KINDS}
    told |= {f"{kind} others": float(torch.cat(others[kind]).mean()) for kind in KINDS}
    return {**told, "fill": fmean(fills)}


def routing(g: Tensor, shard_of: Tensor) -> dict[str, float]:
    """How many keys go to their own shard, and the leverages behind that."""
    own = g.gather(1, shard_of[:, None]).squeeze(1)
    other = g.scatter(1, shard_of[:, None], 0.0).amax(1)
    return {
        "routed": float((g.argmax(1) == shard_of).double().mean()),
        "leverage": float(own.mean()),
        "largest other": float(other.mean()),
    }


def information(K: Tensor, D: Tensor) -> Tensor:
    """KᵀDK of keys (facts, rows, d_k)."""
    rows = K.flatten(0, 1)
    return rows.T @ (D.flatten()[:, None] * rows)


def variances(C: Tensor, X: Tensor) -> Tensor:
    """x C xᵀ of each row."""
    return ((X @ C) * X).sum(1)


if __name__ == "__main__":
    main()
