"""Second moments for EasyEdit's other editors, from any text that this package can use."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.anchors.cache import easyedit_files, moments, write_npz
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import AnchorError
from easyedit_rls.model.layout import find_layout


def write_moments(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    *,
    dataset: str | None = None,
    show_progress: bool | None = None,
) -> list[Path]:
    """Write the moments of all edited layers where EasyEdit's ``layer_stats`` looks before it downloads a
    data set.

    MEMIT, AlphaEdit and the others then start without Wikipedia, as long as their settings say the same
    `mom2_dataset`, `mom2_n_samples`, `mom2_dtype` and `stats_dir`, and name layers among these.

    Args:
        model: the unedited model.
        tok: its tokenizer.
        hparams: layers and module names, where the text comes from, and stats_dir.
        dataset: the `mom2_dataset` that the other editors' settings name, if it isn't the same.
        show_progress: None shows bars on a terminal only.

    Returns:
        The files written, one a layer.

    Raises:
        AnchorError: the text can't be had, or the name of the data set can't be part of a path.
    """
    name = hparams.mom2_dataset if dataset is None else dataset
    if "/" in name or name.endswith(".txt"):
        raise AnchorError(
            f"EasyEdit makes '{name}' part of a path. "
            "Give the short name that the other settings use, e.g. wikipedia."
        )
    found = moments(model, tok, hparams, show_progress=show_progress)
    named = RLSEditHyperParams.from_dict({**hparams.to_dict(), "mom2_dataset": name})
    places = easyedit_files(model, find_layout(model, hparams), named)
    for layer, path in places.items():
        write_npz(path, found[layer], hparams.mom2_n_samples)
    return list(places.values())
