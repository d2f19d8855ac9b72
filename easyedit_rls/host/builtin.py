"""EasyEdit's own editors, for comparisons: settings from the model's layout, templates and moments shared
with RLSEdit.
"""

import contextlib
import importlib
import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.errors import HostError, HyperParamsError, RequestError
from easyedit_rls.host.find import easyeditor
from easyedit_rls.host.moments import write_moments

_DATASET = (
    "wikitext"  # names the folder that EasyEdit looks for moments in; what the text is, our settings say
)
_MODULES = (
    "rewrite_module_tmp",
    "layer_module_tmp",
    "mlp_module_tmp",
    "attn_module_tmp",
    "ln_f_module",
    "lm_head_module",
)
_VALUES = ("v_num_grad_steps", "v_lr", "v_loss_layer", "v_weight_decay", "clamp_norm_factor", "kl_factor")
_MOMENTS = ("mom2_n_samples", "mom2_dtype", "stats_dir")
_PLACES = ("stats_dir", "P_loc")
_LOCATING = {"fact_token": "subject_last"}


def _alphaedit(hp: RLSEditHyperParams) -> dict[str, Any]:
    own = {
        "mom2_update_weight": hp.mom2_update_weight,
        "nullspace_threshold": 2e-2,
        "L2": 10.0,
        "P_loc": f"{hp.stats_dir}/none.pt",
    }
    return {**_memit(hp), **own}


def _memit(hp: RLSEditHyperParams) -> dict[str, Any]:
    shared = _some(hp, (*_MODULES, *_VALUES, *_MOMENTS, "layers"))
    return {
        **shared,
        **_LOCATING,
        "layer_selection": "all",
        "mom2_adjustment": True,
        "mom2_update_weight": hp.mom2_update_weight,
    }


def _rome(hp: RLSEditHyperParams) -> dict[str, Any]:
    own = {
        "layers": [hp.layers[len(hp.layers) // 2]],
        "mom2_adjustment": True,
        "context_template_length_params": [[5, 10], [10, 10]],
    }
    return {**_some(hp, (*_MODULES, *_VALUES, *_MOMENTS)), **_LOCATING, **own}


def _ft(hp: RLSEditHyperParams) -> dict[str, Any]:
    own = {
        "layers": [hp.layers[-1]],
        "num_steps": 25,
        "lr": 5e-4,
        "weight_decay": 0.0,
        "kl_factor": 0.0,
        "norm_constraint": False,
    }
    return {**_some(hp, _MODULES), **own, "objective_optimization": "target_new", "batch_size": 1}


def _ultraedit(hp: RLSEditHyperParams) -> dict[str, Any]:
    modules = [hp.rewrite_module_tmp.format(layer) for layer in hp.layers]
    own = {
        "inner_params": modules,
        "lr": 1e-6,
        "batch_size_once": 10,
        "editor_batch_size": 1024,
        "half": False,
    }
    names = {
        "model_class": "AutoModelForCausalLM",
        "tokenizer_class": "AutoTokenizer",
        "tokenizer_name": hp.model_name,
    }
    return {
        **own,
        **names,
        "dropout": 0.0,
        "no_grad_layers": None,
        "token": "mask",
        "silent": True,
        "batch_size": 1,
        "results_dir": ".",
    }


def _some(hp: RLSEditHyperParams, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(hp, name) for name in names}


_SETTINGS: dict[str, Callable[[RLSEditHyperParams], dict[str, Any]]] = {
    "AlphaEdit": _alphaedit,
    "MEMIT": _memit,
    "ROME": _rome,
    "FT": _ft,
    "ULTRAEDIT": _ultraedit,
}
_CLASSES = {"ULTRAEDIT": "UltraEditHyperParams"}
_NEEDS_MOMENTS = ("AlphaEdit", "MEMIT", "ROME")
BUILTIN = tuple(_SETTINGS)


class EasyEditBaseline:
    """One of EasyEdit's editors as a function of a batch; edits the model in place.

    What these editors keep in module globals and in objects of the module is put there when one is made: one
    at a time in a process.

    Args:
        alg_name: one of `BUILTIN`.
        model: the unedited model.
        tok: its tokenizer; its padding side, and a pad token where it has none, are set during an edit as
            EasyEdit's own paths set them, and put back.
        hparams: RLSEdit's settings: layers, module names, value optimization, moments.
        templates: texts to put before each prompt, besides the bare prompt.
        settings: what shall differ from the settings made of these.
        show_progress: of the moments; None shows bars on a terminal only.

    Raises:
        HostError: there is no checkout, or no such editor.
        HyperParamsError: a setting isn't one of this editor's.
    """

    def __init__(
        self,
        alg_name: str,
        model: PreTrainedModel,
        tok: PreTrainedTokenizerBase,
        hparams: RLSEditHyperParams,
        templates: Sequence[str],
        settings: Mapping[str, Any] | None = None,
        show_progress: bool | None = None,
    ) -> None:
        if alg_name not in _SETTINGS:
            raise HostError(
                f"No way is known to compare with '{alg_name}'; known: RLSEdit, {', '.join(BUILTIN)}."
            )
        package = easyeditor()
        self.alg_name, self.model, self.tok = alg_name, model, tok
        self._folder = tempfile.TemporaryDirectory()
        shared = RLSEditHyperParams.from_dict({**hparams.to_dict(), "stats_dir": self._folder.name})
        known = getattr(package, _CLASSES.get(alg_name, f"{alg_name}HyperParams"))
        self.settings = _settings(alg_name, known, model, shared, settings or {})
        self._apply = importlib.import_module("easyeditor.util.alg_dict").ALG_DICT[alg_name]
        if alg_name in _NEEDS_MOMENTS:
            write_moments(model, tok, shared, dataset=_DATASET, show_progress=show_progress)
        self._prepare(templates)

    def describe(self) -> dict[str, Any]:
        """The settings, but for the temporary places of moments and projection."""
        return {name: value for name, value in vars(self.settings).items() if name not in _PLACES}

    def memory(self) -> dict[str, Tensor]:
        """What EasyEdit remembers of the edits beside the weights: AlphaEdit's keys; the others keep nothing
        from batch to batch.
        """
        if self.alg_name == "AlphaEdit":
            from easyeditor.models.alphaedit import AlphaEdit_main

            if AlphaEdit_main.cache_c_new:
                return {"cache_c": AlphaEdit_main.cache_c}
        return {}

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Put back what `memory` gave; it is all there is, whatever the number of batches."""
        if memory:
            from easyeditor.models.alphaedit import AlphaEdit_main

            AlphaEdit_main.cache_c, AlphaEdit_main.cache_c_new = memory["cache_c"], True
        return True

    def close(self) -> None:
        """Remove the files that EasyEdit was given."""
        self._folder.cleanup()

    def edit(self, requests: Sequence[EditRequest]) -> str:
        """Edit one batch, or each request by itself where the editor knows no batches (ROME); returns what
        EasyEdit printed.
        """
        given = [_request(request, i) for i, request in enumerate(requests)]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), self._padding():
            for some in [[one] for one in given] if self.alg_name == "ROME" else [given]:
                if self.alg_name == "ULTRAEDIT":
                    self.settings.batch_size = len(some)
                    self.settings.batch_size_once = min(self.settings.batch_size_once, len(some))
                self._apply(self.model, self.tok, some, self.settings)
        return printed.getvalue()

    def _prepare(self, templates: Sequence[str]) -> None:
        """Templates, projections and empty histories into EasyEdit's module globals."""
        texts = [text.replace("{", " ").replace("}", " ") + "{}" for text in templates]
        if self.alg_name == "ROME":
            from easyeditor.models.rome import rome_main

            rome_main.CONTEXT_TEMPLATES_CACHE = ["{}", *texts]
        elif self.alg_name == "MEMIT":
            from easyeditor.models.memit import memit_main

            memit_main.CONTEXT_TEMPLATES_CACHE, memit_main.COV_CACHE = [["{}"], texts], {}
        elif self.alg_name == "AlphaEdit":
            from easyeditor.models.alphaedit import AlphaEdit_main

            AlphaEdit_main.CONTEXT_TEMPLATES_CACHE, AlphaEdit_main.COV_CACHE = [["{}"], texts], {}
            with contextlib.redirect_stdout(io.StringIO()):
                found = [
                    AlphaEdit_main.get_project(self.model, self.tok, layer, self.settings)
                    for layer in self.settings.layers
                ]
            AlphaEdit_main.P, AlphaEdit_main.P_loaded = torch.stack([matrix.cpu() for matrix in found]), True
            AlphaEdit_main.cache_c_new = False
            torch.save(AlphaEdit_main.P, self.settings.P_loc)

    @contextlib.contextmanager
    def _padding(self) -> Iterator[None]:
        before = self.tok.padding_side, self.tok.pad_token
        self.tok.padding_side = "left" if self.alg_name in ("FT", "ULTRAEDIT") else "right"
        self.tok.pad_token = self.tok.pad_token or self.tok.eos_token
        try:
            yield
        finally:
            self.tok.padding_side, self.tok.pad_token = before


def _settings(
    alg_name: str, known: type, model: PreTrainedModel, hp: RLSEditHyperParams, changes: Mapping[str, Any]
) -> Any:
    """EasyEdit's settings object."""
    name = (model.config._name_or_path or hp.model_name).rstrip("/").rsplit("/")[-1]
    device = "cpu" if model.device.type == "cpu" else model.device.index
    general = {
        "alg_name": alg_name,
        "device": device,
        # some look for a family in the name, and all these do for one like it what is right for any
        "model_name": f"{name}-llama",
        "mom2_dataset": _DATASET,
        "model_parallel": False,
    }
    made = {**general, **_SETTINGS[alg_name](hp)}
    if alg_name == "MEMIT":
        made["lm_head_module"] = _owner_of_head(model, hp.lm_head_module)
    names = {field.name for field in fields(known)}
    if unknown := sorted(set(changes) - names):
        raise HyperParamsError(
            f"{alg_name} has no setting {', '.join(unknown)}; it has {', '.join(sorted(names))}."
        )
    return known(**{key: value for key, value in {**made, **changes}.items() if key in names})


def _owner_of_head(model: PreTrainedModel, lm_head: str) -> str:
    """The module under which the head's weight is found by name (MEMIT looks there): of a tied head, the
    embedding.
    """
    weight = model.get_submodule(lm_head).weight
    owner: str = next(name for name, parameter in model.named_parameters() if parameter is weight)
    return owner.removesuffix(".weight")


def _request(request: EditRequest, index: int) -> dict[str, Any]:
    if request.chat is not None:
        raise RequestError(
            "is a chat, which EasyEdit's editors don't know. Give a plain prompt.",
            index=index,
            field="messages",
        )
    return {
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target,
        "case_id": request.case_id if request.case_id is not None else index,
    }
