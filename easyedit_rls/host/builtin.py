"""The former door to EasyEdit's editors, for callers that don't use `editors.base.EDITORS` yet."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.base import EDITORS, Editor, Setup

BUILTIN = ("AlphaEdit", "MEMIT", "ROME", "FT", "ULTRAEDIT")


def EasyEditBaseline(
    alg_name: str,
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    templates: Sequence[str],
    settings: Mapping[str, Any] | None = None,
) -> Editor:
    """The editor of that name before its first batch."""
    return EDITORS.get(alg_name).begin(Setup(model, tok, hparams, templates, settings or {}))
