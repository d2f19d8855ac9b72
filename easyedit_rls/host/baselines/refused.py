"""Editors of EasyEdit's that can't be compared with the others here, and why."""

from easyedit_rls.editors.base import EDITORS

_TRAINED = "has to be trained on a data set of edits first. Take ULTRAEDIT, which is trained on none."
_NO_EDIT = "changes no model: it puts examples or retrieved facts into the prompt. Take InContext."

EDITORS.refuse(
    {
        "MEND": _TRAINED,
        "SERAC": _TRAINED,
        "IKE": _NO_EDIT,
        "DeepEdit-Api": "asks a service on the network. Compare editors of models that are here.",
        "FT-Api": "asks a service on the network. Take FT.",
        "MELO": "loads a tokenizer of a classifier by its name on the network. Take GRACE or LoRA.",
        "DEFER": "replaces the outputs of all tokens by what a text's last token says, so answers behind a "
        "prompt can't be scored. Take GRACE.",
        "SimIE": "wraps another editor, whose settings it reads from a file beside its own. "
        "Take that editor itself.",
        "KN": "needs the answer that was true before, and finds neurons in families that it knows by name. "
        "Take ROME.",
        "DINM": "makes a model's answers safe, and needs a safe and an unsafe answer to each. Take FT.",
        "DPO": "needs a wrong answer to each prompt beside the right one. Take LoRA.",
        "QLoRA": "lays the answer's tokens over the prompt's as labels, from the first one on. Take LoRA.",
    }
)
