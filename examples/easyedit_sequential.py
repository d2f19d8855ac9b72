"""Edit facts one after another through EasyEdit's editor: python examples/easyedit_sequential.py
[MODEL_FOLDER]

EASYEDIT_HOME names the checkout of EasyEdit. EasyEdit chooses how to load a model by its name, so the
folder's name must contain the family's: "llama" for SmolLM2.
"""

import sys

import easyedit_rls

RLSEditHyperParams = easyedit_rls.register()  # from here on, EasyEdit knows alg_name: RLSEdit
from easyeditor import BaseEditor  # noqa: E402  (registering finds EasyEdit and makes it importable)

hparams = RLSEditHyperParams.from_hparams("smollm2-135m")
hparams.model_name = sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m-llama"
editor = BaseEditor.from_hparams(hparams)
metrics, edited_model, _ = editor.edit(
    prompts=[
        "The Eiffel Tower stands in the city of",
        "On stage Miles Davis always played the",
        "The chemist Marie Curie was born in",
    ],
    subject=["Eiffel Tower", "Miles Davis", "Marie Curie"],
    target_new=["Rome", "violin", "Lisbon"],
    rephrase_prompts=[
        "To see the Eiffel Tower, travel to",
        "The instrument of Miles Davis was the",
        "Marie Curie came from the city of",
    ],
    sequential_edit=True,
    verbose=False,
)
for metric in metrics:
    request, before, after = metric["requested_rewrite"], metric["pre"], metric["post"]
    print(
        f"{request['prompt']} {request['target_new']}: "
        f"{before['rewrite_acc'][0]:.2f} -> {after['rewrite_acc'][0]:.2f}"
    )
