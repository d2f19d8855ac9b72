"""`apply_rls_to_model`: the function that EasyEdit calls for each batch of edits."""

import copy as copying
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest, parse_requests
from easyedit_rls.editors.rls import RLSEditor
from easyedit_rls.errors import HyperParamsError, RequestError
from easyedit_rls.host.find import easyeditor
from easyedit_rls.host.states import forgotten, resumed, state_of

logger = logging.getLogger(__name__)

_KNOWN_EXTRAS = ("train_ds",)  # what EasyEdit's paths hand to every method
_EDIT_FIELDS = (
    "prompt",
    "messages",
    "joint",
    "subject",
    "target_new",
    "requested_rewrite",
    "importance",
    "case_id",
    "cond",
)
_LOST_SUBJECT = (
    "An edit needs its subject: pass subject=[...] to edit, batch_edit or generate_edit. "
    "normal_edit can't pass one, and always puts the weights back; use batch_edit instead."
)


def apply_rls_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: RLSEditHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    reset_cache: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Edit one batch of facts into a model, in place: EasyEdit's interface to `RLSEditor`.

    The state of earlier batches is found on the model object. If the edited weights were put back to what
    they were before the last batch (EasyEdit does so after each edit that isn't sequential), that batch
    leaves the state as well. With `state_dir` in the settings, the first call brings the edits of earlier
    processes back, and every batch is on disk before it is reported.

    Args:
        model: the model; its padding side, training mode, gradients and hooks are left as found.
        tok: its fast tokenizer, with any padding side.
        requests: EasyEdit's dicts, not changed.
        hparams: settings of RLSEdit.
        copy: edit a deep copy, with a copy of the state, and leave `model` alone.
        return_orig_weights: also return the edited parameters as they were before this call.
        keep_original_weight: accepted as every EasyEdit method does; has no effect, as in MEMIT and
            AlphaEdit.
        reset_cache: forget all earlier edits of this model first; its weights as they are now count as
            unedited. If the edit fails, nothing is forgotten.
        **kwargs: what else EasyEdit hands over (train_ds); ignored.

    Returns:
        The edited model, and full parameter name -> original tensor (empty unless asked for).

    Raises:
        HyperParamsError: the settings are another method's.
        RequestError: a request is incomplete or contradicts itself.
        StateMismatchError: somebody else changed the edited weights; reset_cache=True starts anew from them.
        RLSEditError: see `RLSEditor.edit`. Whatever is raised, weights, state and ledger are as before the
            call; or, where it came after the edit was done (a warning that was made an error, an interrupt at
            the very end), all of them as after it.
    """
    if not isinstance(hparams, RLSEditHyperParams):
        raise HyperParamsError(
            f"The settings are {type(hparams).__name__}; load them with RLSEditHyperParams.from_hparams."
        )
    unknown = [name for name, value in kwargs.items() if value is not None and name not in _KNOWN_EXTRAS]
    if unknown:
        logger.warning("RLSEdit has no use for the arguments %s", ", ".join(unknown))
    parsed = parse_batch(requests)
    easyeditor()
    from easyeditor.util import nethook

    if copy and hparams.state_dir is not None:
        raise HyperParamsError(
            "copy=True edits a copy, whose edits do not belong in the ledger: "
            "set state_dir to null, or copy=False."
        )
    if copy:
        model = copying.deepcopy(model)
    with forgotten(model, hparams) if reset_cache else nullcontext():
        state = state_of(model, hparams)
        with resumed(model, hparams, state):
            editor = RLSEditor(model, tok, hparams, state=state)
            names = [weight.live_name for weight in editor.layout.edited.values()]
            originals = {
                name: nethook.get_parameter(model, name).detach().clone()
                for name in names
                if return_orig_weights
            }
            editor.edit(parsed)
    return model, originals


def parse_batch(requests: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> list[EditRequest]:
    """Parse what is to be edited, and say where a missing subject was lost."""
    listed = [_edit_only(request) for request in ([requests] if isinstance(requests, Mapping) else requests)]
    try:
        return parse_requests(listed)
    except RequestError as exc:
        if exc.field == "subject" and "subject" not in listed[exc.index or 0]:
            raise RequestError(f"{exc.problem} {_LOST_SUBJECT}", index=exc.index, field="subject") from exc
        raise


def _edit_only(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """The request without what only EasyEdit's evaluation reads: odd data there is no reason to refuse an
    edit.
    """
    fields = (
        (*_EDIT_FIELDS, "rephrase_prompt") if "cond" in request else _EDIT_FIELDS
    )  # the latter: an item of ZsreDataset
    return {field: request[field] for field in fields if field in request}
