"""Which prompts reach MEMOIR's memory: how much masks of rewordings and of other prompts share with those of
edits, by the unedited model's keys; prints one JSON object.

    python benchmarks/masks.py --model MODEL --data zsre.json --first 0 --count 300 --layers 20 25

Nothing is edited: masks depend on keys alone. `rewordings` counts those that find the mask of their own edit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from common import as_json, load, parser, settings_of, versions
from torch import Tensor

from easyedit_rls.data.records import read_records
from easyedit_rls.editors.base import Setup
from easyedit_rls.editors.memoir import MEMOIR
from easyedit_rls.model.attached_memory import remove_memory
from easyedit_rls.model.subject import prompt_rows


def main() -> None:
    options = parser(__doc__, "model", "data", "hparams", "set", "layers", "first", "count", "threads")
    thresholds = [0.3, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8]
    options.add_argument("--thresholds", type=float, nargs="+", default=thresholds, help="shares in common")
    args = options.parse_args()
    torch.set_num_threads(args.threads)
    model, tok = load(args.model)
    hp = settings_of(args, model)
    requests = [record.request for record in read_records(args.data, args.first, args.count)]
    requests = [request for request in requests if request.paraphrases]
    texts = {
        "edits": [request.prompt for request in requests],
        "rewordings": [request.paraphrases[0] for request in requests],
        "others": [probe.prompt for request in requests for probe in request.neighbors[:2]],
    }
    rows = {kind: prompt_rows(tok, some) for kind, some in texts.items()}
    found: dict[str, Any] = {}
    for layer in args.layers or [None]:
        editor = MEMOIR(Setup(model, tok, hp, [], {} if layer is None else {"layer": layer}))
        masks = {kind: masks_of(editor, some).float() for kind, some in rows.items()}
        top_k = editor.masked.top_k
        shared = masks["rewordings"] @ masks["edits"].T / top_k
        own, nearest = shared.max(1)
        is_right = nearest == torch.arange(len(nearest))
        other = (masks["others"] @ masks["edits"].T / top_k).max(1).values
        found[str(editor.describe()["layer"])] = {
            "top_k": top_k,
            **{
                f"{threshold:g}": {
                    "rewordings": float(((own >= threshold) & is_right).float().mean()),
                    "others": float((other >= threshold).float().mean()),
                }
                for threshold in args.thresholds
            },
        }
        remove_memory(model)
    print(as_json({"layers": found, "facts": len(requests), **versions()}))


@torch.no_grad()
def masks_of(editor: MEMOIR, rows: Sequence[Sequence[int]]) -> Tensor:
    """Masks of tokenized prompts, (n, d_k), bool."""
    return torch.cat([editor.masked.masks_of(editor.features([row])) for row in rows])


if __name__ == "__main__":
    main()
