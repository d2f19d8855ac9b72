"""Edits that survive the process: edit with a ledger, start again from the unedited model, take one edit
back.

    python examples/ledger.py models/smollm2-135m my-edits

The first run reads a text to learn what the layers of the model usually see (a minute or two); what it finds
is cached. Run it again: the edits are there at once.
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate

FACTS = [
    {"prompt": "The Eiffel Tower stands in the city of", "subject": "Eiffel Tower", "target_new": "Rome"},
    {
        "prompt": "The mother tongue of Danielle Darrieux is",
        "subject": "Danielle Darrieux",
        "target_new": "English",
    },
]


def main(folder: str, ledger: str) -> None:
    tok = AutoTokenizer.from_pretrained(folder)
    hparams = RLSEditHyperParams.from_hparams("smollm2-135m")

    model = AutoModelForCausalLM.from_pretrained(folder)
    with RLSEditor(model, tok, hparams, state_dir=ledger) as editor:
        print("found ", editor.n_edits, "edits")
        report = editor.edit(FACTS)  # the same prompts again supersede the older edits
        numbers = [fact.edit_id for fact in report.facts]
        print("edited", evaluate(model, tok, FACTS).rewrite_accuracy, "as numbers", numbers)

    fresh = AutoModelForCausalLM.from_pretrained(folder)  # unedited, as in a new process
    with RLSEditor(fresh, tok, hparams, state_dir=ledger) as editor:
        print("again ", evaluate(fresh, tok, FACTS).rewrite_accuracy)  # nothing was optimized again
        editor.retract(numbers[1])
        print("left  ", [evaluate(fresh, tok, fact).rewrite_accuracy for fact in FACTS])


if __name__ == "__main__":
    main(*sys.argv[1:3])
