"""EasyEdit's editors by name."""

from collections.abc import Sequence
from typing import Any

from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import Editor, Setup, register_editor
from easyedit_rls.host.builtin import BUILTIN, EasyEditBaseline


class Baseline(EasyEditBaseline, Editor):
    """One of them."""

    needs_host = True

    @classmethod
    def begin(cls, setup: Setup) -> "Baseline":
        """The editor before its first batch."""
        return cls(cls.__name__, setup.model, setup.tok, setup.hparams, setup.templates, setup.settings)

    def edit(self, requests: Sequence[EditRequest]) -> Any:
        """Edit a batch."""
        return super().edit(requests)

    def describe(self) -> dict[str, Any]:
        """All settings."""
        return super().describe()


for _name in BUILTIN:
    register_editor(_name)(type(_name, (Baseline,), {}))
