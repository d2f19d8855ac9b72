"""Does a text's first token belong into the second moments? Lengths of its keys and outputs, and edits with
and without it.

    python benchmarks/start_token.py --model MODEL --data pararel_dev.json \
        --text wikitext2_test.txt --moments wikitext2_valid.txt

The first token is the start token where the tokenizer puts one there. Prints one JSON object: for each edited
layer the mean ‖k‖² and the median length of the MLP's output, of first tokens and of all others; and for each
way to take the moments what a stream of edits does. `unweighed` is without the weights that `moments.py`
gives tokens where a norm stands behind the MLP.
"""

import copy
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from common import as_json, load, machine, parser, records_of, settings_of, versions

from easyedit_rls import RLSEditor, evaluate, perplexity
from easyedit_rls.anchors.moments import Moment, sum_moments
from easyedit_rls.model.hooks import tap, undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.residual import Residual
from easyedit_rls.model.tokens import encode

_ROW = 128  # tokens of a text


def texts(tok, path: Path, n_rows: int) -> list[list[int]]:
    """Tokens of the file's longer lines, spread over it."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line) > 200]
    return [list(encode(tok, line, max_tokens=_ROW).ids) for line in lines[:: max(1, len(lines) // n_rows)]]


def lengths(model, layout, rows) -> dict[int, dict[str, float]]:
    """Of keys and outputs, first tokens and others."""
    modules = {layer: weight.module for layer, weight in layout.edited.items()}
    found = {layer: ([], []) for layer in modules}
    with undisturbed(model):
        for row in rows:
            outputs = {("output", layer): module for layer, module in modules.items()}
            with tap(inputs=modules, outputs=outputs, stop=True) as seen:
                model(torch.tensor([row]))
            for layer, (keys, out) in found.items():
                keys.append(seen[layer].reshape(len(row), -1).square().sum(1))
                out.append(seen["output", layer].reshape(len(row), -1).norm(dim=1))
    return {
        layer: {
            "first_key_squared": float(torch.stack([k[0] for k in keys]).mean()),
            "other_key_squared": float(torch.cat([k[1:] for k in keys]).mean()),
            "first_output": float(torch.stack([o[0] for o in out]).median()),
            "other_output": float(torch.cat([o[1:] for o in out]).median()),
        }
        for layer, (keys, out) in found.items()
    }


def without_first(every: Moment, first: Moment) -> Moment:
    """Moments of all tokens but the first ones."""
    n = every.n_tokens - first.n_tokens
    return Moment((every.mean * every.n_tokens - first.mean * first.n_tokens) / n, n)


def main() -> None:
    options = parser(
        __doc__, "model", "data", "text", "hparams", "first", "count", "batch", "set", hparams="init", first=0
    )
    options.add_argument("--moments", type=Path, required=True, help="plain text for the second moments")
    options.add_argument("--rows", type=int, default=300, help="texts of it (default: %(default)s)")
    args = options.parse_args()
    model, tok = load(args.model)
    hparams = settings_of(args, model)
    layout = find_layout(model, hparams)
    rows = texts(tok, args.moments, args.rows)
    plain = copy.copy(layout)
    plain.__dict__["residuals"] = {
        layer: Residual(residual.scale, None) for layer, residual in layout.residuals.items()
    }

    def taken(where, texts_) -> dict[int, Moment]:
        return sum_moments(
            model, where, hparams.layers, [texts_], replace(hparams, mom2_tolerance=0), show_progress=False
        )

    every, first = taken(plain, rows), taken(plain, [row[:1] for row in rows])
    ways = {"with": every, "without": {layer: without_first(every[layer], first[layer]) for layer in every}}
    if any(residual.norm is not None for residual in layout.residuals.values()):
        ways = {f"unweighed, {name}": found for name, found in ways.items()} | {
            "weighed, with": taken(layout, rows)
        }

    records, text = records_of(args), args.text.read_text(encoding="utf-8")
    unedited = {layer: weight.snapshot() for layer, weight in layout.edited.items()}

    def measure() -> dict[str, float | None]:
        return {**evaluate(model, tok, records).means(), "perplexity": perplexity(model, tok, text)}

    edited = {}
    before = measure()
    for name, found in ways.items():
        with patch("easyedit_rls.anchors.prior.moments", return_value=found):
            editor = RLSEditor(model, tok, hparams)
            for at in range(0, len(records), args.batch):
                editor.edit(records[at : at + args.batch])
        edited[name] = measure()
        for layer, parameter in unedited.items():
            layout.edited[layer].restore(parameter)
    result = {
        "lengths": lengths(model, layout, rows[:40]),
        "before": before,
        "edited": edited,
        "settings": hparams.to_dict(),
        "versions": versions(),
        "machine": machine(),
    }
    print(as_json(result))


if __name__ == "__main__":
    main()
