"""Arguments of an editor, checked before anything is done."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import ArgumentError
from easyedit_rls.ledger.state import EditorState


def refuse_wrong_types(tok: object, hparams: object, state: object, state_dir: object) -> None:
    """See that arguments of `RLSEditor` are of the kinds it takes.

    Raises:
        ArgumentError: one is not.
    """
    if not isinstance(hparams, RLSEditHyperParams):
        cure = (
            "Give RLSEditHyperParams: "
            "from_hparams reads a file, from_dict takes a mapping, for_model makes them."
        )
        raise ArgumentError(f"hparams is a {type(hparams).__name__}. {cure}")
    if not isinstance(tok, PreTrainedTokenizerBase):
        raise ArgumentError(f"tok is a {type(tok).__name__}, not a tokenizer. Load it with AutoTokenizer.")
    if state is not None and not isinstance(state, EditorState):
        raise ArgumentError(
            f"state is a {type(state).__name__}, not an EditorState. Give another editor's state, or None."
        )
    if state_dir is not None and not isinstance(state_dir, (str, Path)):
        raise ArgumentError(f"state_dir is a {type(state_dir).__name__}, not the name of a folder.")
