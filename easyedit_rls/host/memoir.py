"""MEMOIR as a method of EasyEdit: ``alg_name: MEMOIR``, with `editors.memoir`."""

import copy as copying
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.settings import check_fields, setting
from easyedit_rls.config.files import find_settings
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.config.reading import no_mapping, read_yaml, typed
from easyedit_rls.editors.base import Setup
from easyedit_rls.editors.memoir import MEMOIR, MEMOIRSettings
from easyedit_rls.errors import HyperParamsError, StateMismatchError
from easyedit_rls.host.apply import parse_batch
from easyedit_rls.host.find import easyeditor
from easyedit_rls.model.attached_memory import (
    find_memory_of,
    hang_memory,
    memory_weight_name,
    remove_memory,
)
from easyedit_rls.model.sampling import sample_templates


@dataclass(kw_only=True)
class MEMOIRHyperParams(MEMOIRSettings):
    """Settings file of MEMOIR: what `MEMOIRSettings` has, and what EasyEdit asks of every method's. Names of
    modules are read off the model.

    Raises:
        HyperParamsError: a value is out of its range.
    """

    alg_name: str = setting("Always MEMOIR.", "MEMOIR", choices=["MEMOIR"])
    model_name: str = setting("Hub name or folder of the model that these settings are for.")
    device: Any = setting("EasyEdit's device: cpu, or a CUDA index.", "cpu")
    n_templates: int = setting("Texts sampled from the model, to learn a fact behind.", 10, least=0)
    seed: int = setting("Seed of templates and permutation.", 0, least=0)
    max_length: int = setting("Longest prompt that EasyEdit's evaluation tokenizes.", 40, least=1)
    batch_size: int = setting("Edits that EasyEdit hands over at once.", 1, least=1)
    model_parallel: bool = setting("EasyEdit's key.", False)

    def __post_init__(self) -> None:
        if isinstance(self.device, float) and self.device.is_integer():
            self.device = int(self.device)  # EasyEdit reads device: "0" as 0.0
        check_fields(self)

    @classmethod
    def from_hparams(cls, path_or_name: str | Path) -> "MEMOIRHyperParams":
        """Read settings from a YAML file, or the shipped ones by name.

        Raises:
            HyperParamsError: not found, not YAML, an unknown or missing key, a wrong type or value.
        """
        path = find_settings(path_or_name, "MEMOIR")
        loaded = read_yaml(path)
        if not isinstance(loaded, dict):
            raise no_mapping(path)
        return cls(**typed(cls, loaded, str(path)))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)

    def own(self) -> dict[str, Any]:
        """The editor's own."""
        return {one.name: getattr(self, one.name) for one in fields(MEMOIRSettings)}


def apply_memoir_to_model(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    requests: Sequence[Mapping[str, Any]],
    hparams: MEMOIRHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    keep_original_weight: bool = False,
    reset_cache: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Edit one batch of facts into a memory beside one projection: EasyEdit's interface to `MEMOIR`.

    The memory of earlier batches is found on the model. Where EasyEdit put W_m back, the last batch's masks
    go as well, with the next call.

    Args:
        model: the model; its weights stay as they are.
        tok: its fast tokenizer.
        requests: EasyEdit's dicts, not changed.
        hparams: settings.
        copy: edit a deep copy, and leave `model` alone.
        return_orig_weights: also return W_m as it was before this call.
        keep_original_weight: accepted as every EasyEdit method does; has no effect.
        reset_cache: take the memory off first, with all its edits; if the edit fails, it is there again.
        **kwargs: what else EasyEdit hands over; ignored.

    Returns:
        The edited model, and full parameter name -> original tensor (empty unless asked for).

    Raises:
        HyperParamsError: the settings are another method's.
        RequestError: a request is incomplete.
        StateMismatchError: the model has a memory that was made under other settings.
    """
    if not isinstance(hparams, MEMOIRHyperParams):
        raise HyperParamsError(
            f"The settings are {type(hparams).__name__}; load them with MEMOIRHyperParams.from_hparams."
        )
    parsed = parse_batch(requests)
    easyeditor()
    from easyeditor.util import nethook

    model = copying.deepcopy(model) if copy else model
    with _taken_off(model) if reset_cache else nullcontext():
        editor = _editor_of(model, tok, hparams)
        known = find_memory_of(model)
        name = memory_weight_name(known[0] if known else "")
        originals = {name: nethook.get_parameter(model, name).detach().clone()} if return_orig_weights else {}
        editor.edit(parsed)
    return model, originals


@contextmanager
def _taken_off(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's memory is off; if the block fails, it is there again."""
    known = find_memory_of(model)
    remove_memory(model)
    try:
        yield
    except BaseException:
        remove_memory(model)
        if known is not None:
            hang_memory(model, model.get_submodule(known[0]), known[1])
        raise


def _editor_of(model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: MEMOIRHyperParams) -> MEMOIR:
    """The editor whose memory the model has, or a new one; it goes on with a memory that was loaded."""
    known, own = find_memory_of(model), {**hparams.own(), "seed": hparams.seed}
    own["n_templates"] = hparams.n_templates
    if known is not None and known[1].owner is not None:
        settings, editor = known[1].owner
        if settings == own:
            editor.tok = tok
            return editor  # type: ignore[no-any-return]
        raise StateMismatchError(
            f"The model has a memory with {len(known[1].masks)} edits that was not made by these settings. "
            "Use the same throughout a stream, or pass reset_cache=True to start anew."
        )
    hp = RLSEditHyperParams.for_model(model, seed=hparams.seed)
    templates = sample_templates(model, tok, hparams.n_templates, hparams.seed) if hparams.n_templates else []
    editor = MEMOIR(Setup(model, tok, hp, templates, hparams.own()), None if known is None else known[1])
    editor.masked.owner = own, editor
    return editor


def host_memoir_hyperparams() -> type[MEMOIRHyperParams]:
    """A subclass of both `MEMOIRHyperParams` and EasyEdit's ``HyperParams``.

    Raises:
        HostError: EasyEdit is missing.
    """
    package = easyeditor()
    from easyeditor.util.hparams import HyperParams

    @dataclass
    class HostMEMOIRHyperParams(MEMOIRHyperParams, HyperParams):  # type: ignore[misc]
        __doc__ = MEMOIRHyperParams.__doc__

    HostMEMOIRHyperParams.__name__ = HostMEMOIRHyperParams.__qualname__ = "MEMOIRHyperParams"
    HostMEMOIRHyperParams.__module__ = package.__name__
    return HostMEMOIRHyperParams
