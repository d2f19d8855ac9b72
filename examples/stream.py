"""A stream of edits with checkpoints: what is left of each batch as later ones arrive.

    python examples/stream.py models/smollm2-135m smollm2-135m records.json

Records are CounterFact's, ZsRE's, KnowEdit's or EasyEdit's JSON, or JSON lines of prompt, subject,
target_new.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate
from easyedit_rls.data.records import read_records

BATCH = 20


def main(folder: str, hparams: str, data: str) -> None:
    model, tok = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    requests = [record.request for record in read_records(data, count=5 * BATCH)]
    editor = RLSEditor(model, tok, RLSEditHyperParams.from_hparams(hparams))
    for start in range(0, len(requests), BATCH):
        report = editor.edit(requests[start : start + BATCH])
        earlier = [requests[at : at + BATCH] for at in range(0, start + 1, BATCH)]
        kept = [evaluate(model, tok, batch).rewrite_accuracy for batch in earlier]
        moved = max(layer.deviation for layer in report.layers)
        print(
            f"{report.n_edits} edits: rewrite accuracy "
            f"by batch {' '.join(f'{share:.2f}' for share in kept)}, weights moved by {moved:.3f}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:4])
