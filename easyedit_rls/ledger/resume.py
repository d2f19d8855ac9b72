"""Coming back to a ledger: is this its model, and which of its weights does the model hold?"""

import logging
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from easyedit_rls._base.clock import utc_now
from easyedit_rls._version import __version__
from easyedit_rls.anchors.pairs import AnchorPairs
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import StateMismatchError
from easyedit_rls.ledger import Ledger
from easyedit_rls.ledger.manifest import Manifest, describe, describe_anchors
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.snapshot import read_manifest, read_moment, read_prior
from easyedit_rls.ledger.state import EditorState, Memory
from easyedit_rls.model.layout import Layout

logger = logging.getLogger(__name__)


def attach(
    state: EditorState,
    folder: str | Path,
    model: PreTrainedModel,
    layout: Layout,
    memory: Memory,
    hparams: RLSEditHyperParams,
    anchors: AnchorPairs | Sequence[str] | None,
) -> None:
    """Keep a state in a ledger from now on; if there are edits in it already, bring state and model to where
    they were.

    Args:
        state: a fresh one.
        folder: the ledger's.
        model: unedited, or edited up to some batch of this ledger; its edited weights are written.
        layout: its modules.
        memory: where it has its edits.
        hparams: settings.
        anchors: explicit anchors, if any.

    Raises:
        LedgerError: the ledger is held by another editor, damaged, or can't be written.
        StateMismatchError: it belongs to another model or other settings; lists every difference. Nothing was
            changed.
    """
    if state.layers:
        raise StateMismatchError(
            f"The state holds {state.n_edits} edits that are not in the ledger {folder}; "
            "it may be a deep copy's. Make a new editor from the unedited model, or do without state_dir."
        )
    ledger = Ledger(Path(folder))
    try:
        journal = ledger.open()
        moment = Moment(place=ledger.place())
        if journal is not None and not journal.is_closed:
            manifest = read_manifest(journal)
            differences = manifest.differences(identify(model, layout, hparams, anchors, manifest.templates))
            if not any(text.startswith(("widths", "parameters", "layers")) for text in differences):
                moment = read_moment(
                    journal, {layer: weight.parameter.device for layer, weight in layout.edited.items()}
                )
                differences += foreign_weights(moment, memory)
            if differences:
                raise StateMismatchError(
                    f"The ledger in {ledger.folder} is of another model or other settings: "
                    f"{'; '.join(differences)}. Load the model "
                    "that it was made with (unedited, or saved by this editor), "
                    f"by version {manifest.version} of the package on "
                    f"{manifest.created[:10]}, and the same settings, or choose another state_dir."
                )
        if not moment.solutions:
            memory.refuse_unknown()
        with memory.restored_if_it_fails():
            if journal is not None and moment.solutions:
                found = journal
                memory.begin(lambda layer: read_prior(found, layer, layout.edited[layer].parameter.device))
            memory.show(moment)
            state.now, state.ledger, state.history_found = moment, ledger, moment.history
    except BaseException:
        ledger.close()
        raise
    if moment.solutions:
        logger.info("Resumed %d edits in %d batches", state.n_edits, state.n_batches)


def identify(
    model: PreTrainedModel,
    layout: Layout,
    hparams: RLSEditHyperParams,
    anchors: AnchorPairs | Sequence[str] | None,
    templates: Sequence[str],
) -> Manifest:
    """What a ledger of this model under these settings would say of itself."""
    return describe(
        model, layout, hparams, describe_anchors(anchors, hparams), templates, utc_now(), __version__
    )


def foreign_weights(moment: Moment, memory: Memory) -> list[str]:
    """What is wrong with the model's edited weights, if anything: they may be unedited, current, or those of
    an earlier batch.
    """
    current = [layer for layer in moment.solutions if memory.holds(layer, moment.weight(layer))]
    unedited = [layer for layer, W_0 in moment.unedited.items() if memory.holds(layer, W_0)]
    if len(moment.solutions) in (len(current), len(unedited)):
        return []
    found = memory.fingerprint()
    if found in moment.history.fingerprints or any(
        entry.weights == found for entry in moment.history.entries
    ):
        logger.info("The model was saved at an earlier batch of this ledger; it is brought up to date")
        return []
    foreign = sorted(set(moment.solutions) - set(current) - set(unedited)) or sorted(moment.solutions)
    return [f"edited weights of layers {foreign}: neither unedited nor as any batch of the ledger left them"]
