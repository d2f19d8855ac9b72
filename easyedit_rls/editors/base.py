"""What an editor is, to whoever compares editors: a function of a batch, with settings that are checked and a
memory that can be kept.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.registry import Registry

EDITORS: "Registry[type[Editor]]" = Registry(
    "editor", "easyedit_rls.editors", ("easyedit_rls.editors", "easyedit_rls.host.baselines")
)
register_editor = EDITORS.register


@dataclass(frozen=True)
class Setup:
    """What an editor begins with.

    Attributes:
        model: the unedited model.
        tok: its tokenizer.
        hparams: settings of RLSEdit for this model: where its layers are, how values are optimized, where
            second moments come from. Other editors take from them what they share.
        templates: texts to put before each prompt, besides the bare prompt.
        settings: what shall differ from the settings that the editor makes of these.
        place: a folder of its own.
    """

    model: PreTrainedModel
    tok: PreTrainedTokenizerBase
    hparams: RLSEditHyperParams
    templates: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    place: Path = field(default_factory=Path)


class Editor(ABC):
    """Edits facts into one model, batch after batch. Put `register_editor` on a class to compare it by name.

    Attributes:
        model: to be measured: that which the editor was given, or what it put around it or in its place.
        needs_host: whether it runs EasyEdit's code.
        takes_chats: whether it edits chats as well as plain prompts.
    """

    needs_host: ClassVar[bool] = False
    takes_chats: ClassVar[bool] = False
    model: PreTrainedModel

    @classmethod  # noqa: B027
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See, before any work, that these settings can be used.

        Raises:
            HyperParamsError: one is unknown or out of range.
        """

    @classmethod
    @abstractmethod
    def begin(cls, setup: Setup) -> "Editor":
        """The editor before its first batch.

        Raises:
            RLSEditError: it can't be made.
        """

    @abstractmethod
    def edit(self, requests: Sequence[EditRequest]) -> Any:
        """Edit a batch."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """All settings, for JSON."""

    def in_front(self, prompt: str) -> str:
        """Text that is to be put in front of a prompt that is asked, of a chat in front of the user's turn;
        most editors have none.
        """
        return ""

    def memory(self) -> dict[str, Tensor]:
        """What it remembers of its edits beside the model's weights, for `remember`."""
        return {}

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Go on behind that many batches, where the weights that had changed by then are in the model again.

        An editor that keeps nothing else returns True; one that can't go on returns False, as by default, and
        a comparison that was broken off begins anew with it.
        """
        return False

    def close(self) -> None:  # noqa: B027
        """Leave nothing behind on disk."""
