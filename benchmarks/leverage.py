"""Which tokens the gate lets through, layer by layer: leverage of edits' prompts, their paraphrases, their
neighbors, and ordinary text, by the unedited model's keys; prints one JSON object.

    python benchmarks/leverage.py --model MODEL --data counterfact.json --first 0 --count 100 --text TEXT.txt
        --layers 1 2 4 6 --plot leverage.png

Nothing is edited: leverage depends on keys alone. A text counts as open where any of its tokens is. The
thresholds are those that a share of TEXT's tokens pass.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import as_json, gate_factors, load, parser, settings_of, versions
from torch import Tensor

from easyedit_rls.anchors.cache import moments
from easyedit_rls.data.records import read_records
from easyedit_rls.facts.keys import LayerWalk, locate_facts
from easyedit_rls.facts.templates import templates_of
from easyedit_rls.model.batching import pack_batches, pad, run
from easyedit_rls.model.gate import Decision
from easyedit_rls.model.hooks import tap
from easyedit_rls.model.layout import Layout, find_layout
from easyedit_rls.model.tokens import encode, start_tokens
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares

_WINDOW = 256
KINDS = ("edits", "paraphrases", "neighbors", "ordinary tokens")


def main() -> None:
    names = ("model", "data", "text", "hparams", "set", "layers", "first", "count", "threads")
    options = parser(__doc__, *names)
    options.add_argument("--shares", type=float, nargs="+", default=[1e-2, 1e-3, 1e-4], help="of open tokens")
    options.add_argument("--tokens", type=int, default=20_000, help="of the text (default: %(default)s)")
    options.add_argument("--plot", type=Path, metavar="FILE", help="picture to draw")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    hp = settings_of(args, model, {"keys": "each"})
    hp = hp if args.layers is None else replace(hp, layers=args.layers)
    layout = find_layout(model, hp)
    requests = [record.request for record in read_records(args.data, args.first, args.count)]
    known = moments(model, tok, hp)
    facts = locate_facts(tok, requests, templates_of(model, tok, hp), hp.statements)
    ids = tok(args.text.read_text(encoding="utf-8"), add_special_tokens=False).input_ids[: args.tokens]
    start = start_tokens(tok)
    rows = {
        "paraphrases": [encode(tok, text).ids for r in requests for text in r.paraphrases],
        "neighbors": [encode(tok, probe.prompt).ids for r in requests for probe in r.neighbors],
        "ordinary tokens": [[*start, *ids[at : at + _WINDOW]] for at in range(0, len(ids), _WINDOW)],
    }
    walk = LayerWalk(model, layout, facts, hp.batch_tokens, "each")
    found: dict[str, Any] = {}
    drawn: dict[int, dict[str, Tensor]] = {}
    for layer in hp.layers:
        K, moment = walk.advance_to(layer), known[layer].mean
        W_0 = torch.zeros(K.shape[-1], 1, dtype=torch.float64)
        solver = RecursiveLeastSquares(Prior(W_0, hp.mom2_update_weight * moment, 0.0, 1.0, None, moment))
        decision = Decision()
        after = solver.update(K, torch.zeros(*K.shape[:-1], 1), walk.importance)
        decision.factors = gate_factors(solver, after, hp.gate_prior)
        g = {"edits": decision.leverage(K[:, 0])}
        for kind, some in rows.items():
            per_row = [decision.leverage(keys) for keys in keys_of(model, layout, layer, some, len(start))]
            is_text = kind == "ordinary tokens"
            g[kind] = torch.cat(per_row) if is_text else torch.stack([row.max() for row in per_row])
        drawn[layer] = g
        found[str(layer)] = {}
        for share in args.shares:
            threshold = float(torch.quantile(g["ordinary tokens"].double(), 1 - share))
            opened = {kind: float((g[kind] > threshold).float().mean()) for kind in KINDS[:-1]}
            found[str(layer)][f"{share:g}"] = {"threshold": threshold, **opened}
    if args.plot is not None:
        draw(drawn, args.plot)
    print(as_json({"layers": found, "facts": len(facts), "n_0": hp.mom2_update_weight, **versions()}))


def keys_of(
    model: Any, layout: Layout, layer: int, rows: Sequence[Sequence[int]], n_start: int
) -> list[Tensor]:
    """Keys of each row's tokens, start tokens left out, (tokens, d_k)."""
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    for group in pack_batches([len(row) for row in rows], 8192):
        batch = pad([rows[i] for i in group], "right", torch.device("cpu"))
        with torch.no_grad(), tap(inputs={"keys": layout.edited[layer].module}, stop=True) as seen:
            run(model, batch)
        keys = seen["keys"].reshape(*batch.mask.shape, -1)
        for i, own, mask in zip(group, keys, batch.mask.bool()):
            found[i] = own[mask][n_start:]
    return found


def draw(drawn: dict[int, dict[str, Tensor]], path: Path) -> None:
    """g of each kind, a box a layer; the line is what one ordinary token in a thousand passes."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(drawn), figsize=(2.2 * len(drawn) + 1, 3.4), sharey=True)
    for axis, (layer, g) in zip(axes if len(drawn) > 1 else [axes], drawn.items()):
        axis.boxplot([g[kind].numpy() for kind in KINDS], whis=(0.1, 99.9), showfliers=False, widths=0.6)
        axis.axhline(
            float(torch.quantile(g["ordinary tokens"].double(), 0.999)), color="tab:red", linewidth=1
        )
        axis.set_xticks(range(1, 5), [kind.replace(" ", "\n") for kind in KINDS], rotation=60)
        axis.set_title(f"layer {layer}")
    figure.supylabel("leverage g", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
