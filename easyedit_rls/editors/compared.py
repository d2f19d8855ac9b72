"""RLSEdit as an editor to be compared; with the setting `solver`, any update rule in its pipeline."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import Editor, Setup, register_editor
from easyedit_rls.editors.reports import EditReport
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.solvers.rule import find_rule

LEDGER = "ledger"


@register_editor("RLSEdit")
class RLSEdit(Editor):
    """`RLSEditor` with a ledger, which remembers for it.

    Args:
        setup: its settings are RLSEdit's; the ledger is in its place.

    Attributes:
        rls: the editor itself.
    """

    takes_chats: ClassVar[bool] = True

    def __init__(self, setup: Setup) -> None:
        hparams = _changed(setup.hparams, setup.settings)
        given = (
            hparams.context_templates
            if hparams.context_templates is not None
            else list(setup.templates)[: hparams.n_templates]
        )
        self.hparams = _changed(hparams, {"context_templates": given})
        self._ledger = setup.place / LEDGER
        self.model = setup.model
        self.rls = RLSEditor(
            setup.model, setup.tok, self.hparams, state_dir=self._ledger, show_progress=False
        )
        self.rls.prepare()

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that the settings are RLSEdit's, and those of the solver the solver's."""
        made = _changed(hparams, settings)
        find_rule(made.solver, made.solver_settings)

    @classmethod
    def begin(cls, setup: Setup) -> "RLSEdit":
        """An editor whose prior is made, and whose ledger holds what an earlier one left there."""
        return cls(setup)

    def edit(self, requests: Sequence[EditRequest]) -> EditReport:
        """Edit a batch."""
        return self.rls.edit(requests)

    def describe(self) -> dict[str, Any]:
        """All settings."""
        return self.hparams.to_dict()

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Whether the ledger holds as many batches; it may hold one more."""
        return self.rls.state.n_batches == n_batches

    def close(self) -> None:
        """Remove the ledger."""
        self.rls.close()
        shutil.rmtree(self._ledger)


def _changed(hparams: RLSEditHyperParams, changes: Mapping[str, Any]) -> RLSEditHyperParams:
    return RLSEditHyperParams.from_dict({**hparams.to_dict(), **changes})
