"""Edit a fact into the demo model, look, and take it back: python examples/quickstart.py [MODEL_FOLDER]"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate

folder = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m"
model = AutoModelForCausalLM.from_pretrained(folder)
tok = AutoTokenizer.from_pretrained(folder)
editor = RLSEditor(model, tok, RLSEditHyperParams.from_hparams("smollm2-135m"))
facts = [
    {
        "prompt": "The Eiffel Tower stands in the city of",
        "subject": "Eiffel Tower",
        "target_new": "Rome",
        "ground_truth": "Paris",
    },
    {
        "prompt": "On stage {} always played the",
        "subject": "Miles Davis",
        "target_new": "violin",
        "ground_truth": "trumpet",
    },
]

print("before ", evaluate(model, tok, facts).means())
report = editor.edit(facts)
print("after  ", evaluate(model, tok, facts).means())
for fact in report.facts:
    print(f"{fact.prompt} {fact.target}: {fact.steps} steps, {report.seconds_per_edit:.1f} s an edit")
editor.rollback()
print("undone ", evaluate(model, tok, facts).means())
