"""The state of each model, kept on the model itself.

EasyEdit's apply functions get nothing but the model, so the state has to be found from there. It lives in an attribute of the
model object: two models never share anything, a deep copy of a model gets a deep copy of its state, and both end together.
"""

import copy
import json
import warnings
from dataclasses import dataclass

from transformers import PreTrainedModel

from easyedit_rls.errors import RLSEditWarning, StateMismatchError
from easyedit_rls.hparams import RLSEditHyperParams
from easyedit_rls.model.layout import find_layout
from easyedit_rls.state import EditorState

_ATTRIBUTE = "_easyedit_rls_states"


@dataclass(frozen=True)
class _Kept:
    """A state with the settings it was made under."""

    hparams: RLSEditHyperParams
    state: EditorState


def state_of(model: PreTrainedModel, hparams: RLSEditHyperParams) -> EditorState:
    """The state of this model under this objective; a fresh one at the first call.

    Args:
        model: the model to be edited.
        hparams: `RLSEditHyperParams.objective` of them tells states apart.

    Raises:
        LayoutError: the settings name a module that the model lacks.

    Warns:
        RLSEditWarning: the model holds edits that were made under another objective, which the new state knows nothing of.
    """
    find_layout(model, hparams)  # settings that don't fit the model leave nothing behind
    kept: dict[str, _Kept] = model.__dict__.setdefault(_ATTRIBUTE, {})
    key = json.dumps(hparams.objective(), sort_keys=True)
    if key not in kept:
        for other_key, other in list(kept.items()):
            if _is_empty(model, other):
                del kept[other_key]  # each state is as large as the covariances of all its layers
            else:
                warnings.warn(_other_objective(other, hparams), RLSEditWarning, stacklevel=4)
        kept[key] = _Kept(copy.deepcopy(hparams), EditorState())  # the caller may change its own in place
    return kept[key].state


def forget_states(model: PreTrainedModel) -> None:
    """Forget all edits of this model: its weights as they are now count as unedited."""
    model.__dict__.pop(_ATTRIBUTE, None)


def _is_empty(model: PreTrainedModel, kept: _Kept) -> bool:
    try:
        kept.state.follow(find_layout(model, kept.hparams).edited)
    except StateMismatchError:  # the weights were edited since, but may come back to what the state knows
        return False
    return kept.state.n_edits == 0


def _other_objective(other: _Kept, hparams: RLSEditHyperParams) -> str:
    before, now = other.hparams.objective(), hparams.objective()
    changes = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name])
    return (
        f"The model holds {other.state.n_edits} edits made under other settings ({changes}); later batches will not protect them. "
        "Use the same settings throughout a stream, or pass reset_cache=True to start anew."
    )
