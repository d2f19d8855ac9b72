"""Edit facts in batches through EasyEdit's editor, then score all of them again: python
examples/easyedit_batch.py [MODEL_FOLDER]

EasyEdit scores each batch when it has been written; what later batches did to it shows only when all are
scored again at the end. EASYEDIT_HOME and MODEL_FOLDER: see easyedit_sequential.py.
"""

import importlib.resources
import json
import sys

import easyedit_rls

RLSEditHyperParams = easyedit_rls.register()
from easyeditor import BaseEditor, compute_edit_quality  # noqa: E402  (registering finds EasyEdit and makes it importable)

N_FACTS, BATCH = 12, 4
hparams = RLSEditHyperParams.from_hparams("smollm2-135m")
hparams.model_name = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-llama"
hparams.batch_size = BATCH

text = importlib.resources.files("easyedit_rls.data").joinpath("demo_facts.json").read_text(encoding="utf-8")
records = json.loads(text)[:N_FACTS]
facts = [record["requested_rewrite"] for record in records]
editor = BaseEditor.from_hparams(hparams)
metrics, edited_model, _ = editor.batch_edit(
    prompts=[fact["prompt"].replace("{}", fact["subject"]) for fact in facts],
    subject=[fact["subject"] for fact in facts],
    target_new=[fact["target_new"]["str"] for fact in facts],
    rephrase_prompts=[record["paraphrase_prompts"][0] for record in records],
    sequential_edit=True,
    verbose=False,
)
at_once = [metric["post"]["rewrite_acc"][0] for metric in metrics]
at_the_end = [
    compute_edit_quality(
        edited_model, hparams.model_name, hparams, editor.tok, metric["requested_rewrite"], hparams.device
    )["rewrite_acc"][0]
    for metric in metrics
]
for batch in range(0, N_FACTS, BATCH):
    now, end = at_once[batch : batch + BATCH], at_the_end[batch : batch + BATCH]
    print(
        f"batch {batch // BATCH + 1}: rewrite_acc {sum(now) / BATCH:.2f} when written, "
        f"{sum(end) / BATCH:.2f} after the last batch"
    )
