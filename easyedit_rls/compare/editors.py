"""Contenders: RLSEdit and EasyEdit's editors as one kind of thing."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.compare.plan import Contender, Plan
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.rls import RLSEditor

LEDGER = "ledger"


class Editor(Protocol):
    """What a comparison wants of an editor that edits its model in place."""

    def edit(self, requests: Sequence[EditRequest]) -> Any:
        """Edit a batch."""

    def describe(self) -> dict[str, Any]:
        """All settings."""

    def memory(self) -> dict[str, Tensor]:
        """What it remembers of its edits beside the model's weights, for `remember`."""

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Go on behind that many batches, the weights being those of then; False if it can't."""

    def close(self) -> None:
        """Leave nothing behind on disk."""


class OurEditor:
    """RLSEdit, with a ledger, which remembers for it.

    Attributes:
        editor: the editor itself.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        settings: dict[str, Any],
        templates: Sequence[str],
        ledger: Path,
    ) -> None:
        hparams = RLSEditHyperParams.from_dict(settings)
        given = (
            hparams.context_templates
            if hparams.context_templates is not None
            else list(templates)[: hparams.n_templates]
        )
        self._ledger = ledger
        self.hparams = RLSEditHyperParams.from_dict({**hparams.to_dict(), "context_templates": given})
        self.editor = RLSEditor(model, tok, self.hparams, state_dir=ledger, show_progress=False)
        self.editor.prepare()

    def edit(self, requests: Sequence[EditRequest]) -> Any:
        """Edit a batch."""
        return self.editor.edit(requests)

    def describe(self) -> dict[str, Any]:
        """All settings."""
        return self.hparams.to_dict()

    def memory(self) -> dict[str, Tensor]:
        """Nothing: the ledger has it."""
        return {}

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Whether the ledger holds as many batches; it may hold one more."""
        return self.editor.state.n_batches == n_batches

    def close(self) -> None:
        """Remove the ledger."""
        self.editor.close()
        shutil.rmtree(self._ledger)


def make_editor(
    plan: Plan, contender: Contender, model: PreTrainedModel, tok: PreTrainedTokenizerBase, place: Path
) -> Editor:
    """A contender's editor.

    Args:
        plan: whose settings, templates and moments all share.
        contender: which.
        model: unedited.
        tok: its tokenizer.
        place: the contender's folder; RLSEdit keeps its ledger there.
    """
    if contender.alg_name == "RLSEdit":
        return OurEditor(model, tok, {**plan.hparams, **contender.settings}, plan.templates, place / LEDGER)
    from easyedit_rls.host.builtin import EasyEditBaseline

    return EasyEditBaseline(
        contender.alg_name,
        model,
        tok,
        RLSEditHyperParams.from_dict(dict(plan.hparams)),
        plan.templates,
        contender.settings,
    )
