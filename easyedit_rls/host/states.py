"""The state of each model, kept on the model itself.

EasyEdit's apply functions get nothing but the model, so the state has to be found from there. It lives in an
attribute of the model object: two models never share anything, a deep copy of a model gets a deep copy of its
state, and both end together.
"""

import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.gated import GatedMemory, behind_gates
from easyedit_rls.editors.transaction import WeightMemory
from easyedit_rls.errors import RLSEditWarning, StateMismatchError
from easyedit_rls.ledger import Ledger
from easyedit_rls.ledger.state import EditorState
from easyedit_rls.model.layout import find_layout

_ATTRIBUTE = "_easyedit_rls_states"


@dataclass(frozen=True)
class _Kept:
    """A state with the settings it was made under."""

    hparams: RLSEditHyperParams
    state: EditorState


@contextmanager
def forgotten(model: PreTrainedModel, hparams: RLSEditHyperParams) -> Iterator[None]:
    """Forget all edits of this model, so that its weights as they are now count as unedited; but only if the
    block succeeds.
    """
    kept: dict[str, _Kept] = model.__dict__.get(_ATTRIBUTE, {})
    ledgers = {old.state.ledger: old.state.now.place for old in kept.values() if old.state.ledger is not None}
    ours = next(
        (ledger for ledger in ledgers if hparams.state_dir is not None and ledger.is_at(hparams.state_dir)),
        None,
    )
    try:
        model.__dict__[_ATTRIBUTE] = {}
        if hparams.state_dir is not None:
            ledger = Ledger(Path(hparams.state_dir)) if ours is None else ours
            place = ledger.place() if ours is None else ledgers[ours]
            _keep(
                model, hparams, EditorState(ledger, place)
            )  # knows no edits, so the first batch begins a new journal
        yield
    except BaseException:
        new: dict[str, _Kept] = model.__dict__.get(_ATTRIBUTE, {})
        if not any(
            one.state.has_changed for one in new.values()
        ):  # else the edit is done, and what failed came after it
            for one in new.values():
                if one.state.ledger not in (None, ours):
                    one.state.ledger.close()
            model.__dict__[_ATTRIBUTE] = kept
            raise
        _let_go(ledgers, ours)
        raise
    _let_go(ledgers, ours)


def _let_go(ledgers: Iterable[Ledger], besides: Ledger | None) -> None:
    for ledger in ledgers:
        if ledger is not besides:
            ledger.close()


def state_of(model: PreTrainedModel, hparams: RLSEditHyperParams) -> EditorState:
    """The state of this model under this objective; a fresh one at the first call.

    Args:
        model: the model to be edited.
        hparams: `RLSEditHyperParams.objective` of them tells states apart.

    Raises:
        LayoutError: the settings name a module that the model lacks.

    Warns:
        RLSEditWarning: the model holds edits that were made under another objective, which the new state
            knows nothing of.
    """
    find_layout(model, hparams)  # settings that don't fit the model leave nothing behind
    kept: dict[str, _Kept] = model.__dict__.setdefault(_ATTRIBUTE, {})
    key = _key(hparams)
    if key not in kept:
        for other_key, other in list(kept.items()):
            if _is_empty(model, other):
                other.state.close()
                del kept[other_key]  # each state is as large as the covariances of all its layers
            else:
                warnings.warn(_other_objective(other, hparams), RLSEditWarning, stacklevel=4)
        _keep(model, hparams, EditorState())
    return kept[key].state


@contextmanager
def resumed(model: PreTrainedModel, hparams: RLSEditHyperParams, state: EditorState) -> Iterator[None]:
    """If the block fails, weights that it brought back from a ledger are taken out again, and the ledger is
    let go.
    """
    if hparams.state_dir is None or state.ledger is not None:
        yield
        return
    memory = _memory(model, hparams)
    failure: BaseException | None = None
    with memory.restored_if_it_fails():
        try:
            yield
        except BaseException as exc:
            if not state.has_changed:
                if state.ledger is not None:
                    state.ledger.close()
                    model.__dict__[_ATTRIBUTE].pop(_key(hparams))
                raise
            failure = exc  # the edit is done, and what failed came after it: the weights stay
    if failure is not None:
        raise failure


def _memory(model: PreTrainedModel, hparams: RLSEditHyperParams) -> WeightMemory:
    """Where the model's edits are."""
    edited = find_layout(model, hparams).edited
    return GatedMemory(behind_gates(edited)) if hparams.memory == "gated" else WeightMemory(edited)


def _key(hparams: RLSEditHyperParams) -> str:
    return json.dumps(hparams.objective(), sort_keys=True)


def _keep(model: PreTrainedModel, hparams: RLSEditHyperParams, state: EditorState) -> None:
    kept: dict[str, _Kept] = model.__dict__.setdefault(_ATTRIBUTE, {})
    kept[_key(hparams)] = _Kept(copy.deepcopy(hparams), state)  # the caller may change its own in place


def _is_empty(model: PreTrainedModel, kept: _Kept) -> bool:
    try:
        kept.state.sync_with_weights(_memory(model, kept.hparams))
    except StateMismatchError:  # the weights were edited since, but may come back to what the state knows
        return False
    return kept.state.n_edits == 0


def _other_objective(other: _Kept, hparams: RLSEditHyperParams) -> str:
    before, now = other.hparams.objective(), hparams.objective()
    changes = ", ".join(
        f"{name} {before[name]!r} -> {now[name]!r}" for name in now if before[name] != now[name]
    )
    return (
        f"The model holds {other.state.n_edits} edits made under other settings ({changes}); "
        "later batches will not protect them. "
        "Use the same settings throughout a stream, or pass reset_cache=True to start anew."
    )
