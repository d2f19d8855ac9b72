"""Editors that find a value for each fact and write it into the MLPs of some layers: MEMIT and its kin."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.editors.base import register_editor
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.host.baselines.base import MODULES, EasyEditBaseline, owner_of_head, some

VALUES = ("v_num_grad_steps", "v_lr", "v_loss_layer", "v_weight_decay", "clamp_norm_factor", "kl_factor")
MOMENTS = ("mom2_n_samples", "mom2_dtype", "stats_dir")


class Located(EasyEditBaseline):
    """MEMIT's settings, made of RLSEdit's.

    Attributes:
        module: under `easyeditor.models`, whose globals hold templates and moments.
    """

    needs_moments = True
    module: ClassVar[str]

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """Layers, value optimization and moments are RLSEdit's."""
        return {
            **some(hp, *MODULES, *VALUES, *MOMENTS, "layers", "mom2_update_weight"),
            "fact_token": "subject_last",
            "layer_selection": "all",
            "mom2_adjustment": True,
        }

    def complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        """With the head's weight by a name under which it is found."""
        return {**settings, "lm_head_module": owner_of_head(self.model, settings["lm_head_module"])}

    def globals(self, fronts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Context templates and moments."""
        return {self.module: {"CONTEXT_TEMPLATES_CACHE": [["{}"], list(fronts)], "COV_CACHE": {}}}


@register_editor("MEMIT")
class MEMIT(Located):
    """Meng et al. 2023, arXiv 2210.07229."""

    alg_name, module = "MEMIT", "memit.memit_main"
    settings_class = ("memit.memit_hparams", "MEMITHyperParams")


@register_editor("MEMIT-FE")
class MEMITFE(Located):
    """Values at the first edited layer, from which each layer has its own target; arXiv 2605.00358."""

    alg_name, module = "MEMIT-FE", "memit_FE.memit_FE_main"
    settings_class = ("memit_FE.memit_FE_hparams", "MEMITFEHyperParams")


@register_editor("EMMET")
class EMMET(Located):
    """Equality-constrained MEMIT; Gupta et al. 2024, arXiv 2403.14236."""

    alg_name, module = "EMMET", "emmet.emmet_main"
    settings_class = ("emmet.emmet_hparams", "EMMETHyperParams")


@register_editor("CORE")
class CORE(Located):
    """MEMIT with values that differ little from context to context; arXiv 2505.23026."""

    alg_name, module = "CORE", "core.core_main"
    settings_class = ("core.core_hparams", "COREHyperParams")

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """The authors' weight of the differences, in all layers above the edited ones; EasyEdit's is 0."""
        return {**super().defaults(hp), "reg_lambda": 0.01, "layer_range": hp.v_loss_layer - hp.layers[-1]}

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that these are settings of this editor, and leave the contexts to all editors alike."""
        super().check(settings, hparams)
        if settings.get("context") is not None:
            raise HyperParamsError(f"CORE: context is {settings['context']!r}. Leave it out.")
        made = {**cls.defaults(hparams), **settings}
        if made["reg_lambda"] > 0 and made["layer_range"] < 1:
            raise HyperParamsError(f"CORE: layer_range is {made['layer_range']}. Give 1 or more.")


@register_editor("PMET")
class PMET(Located):
    """Values at the outputs of MLP and attention, the former written; Li et al. 2024, arXiv 2308.08742."""

    alg_name, module = "PMET", "pmet.pmet_main"
    settings_class = ("pmet.pmet_hparams", "PMETHyperParams")

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """An MLP's output is short beside the hidden state, so its change has more room."""
        return {
            **super().defaults(hp),
            "rewrite_module_tmps": [hp.rewrite_module_tmp],
            "mlp_module_tmp": hp.rewrite_module_tmp,
            "nll_loss_factor": 1.0,
        }

    def request(self, request: EditRequest, index: int) -> dict[str, Any]:
        """With the space before the target that PMET puts there for models of some names only."""
        found = super().request(request, index)
        return {**found, "target_new": " " + found["target_new"].lstrip(" ")}


@register_editor("EAMET")
class EAMET(Located):
    """Values whose changes are as alike as their keys are; arXiv 2505.11876."""

    alg_name, module = "EAMET", "eamet.eamet_main"
    settings_class = ("eamet.hparams", "EAMETHyperParams")

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """The rest as EasyEdit ships it, the decay too, which is divided by ‖h‖ here and not by its square;
        `mom2_update_weight` may be a list, one a layer.
        """
        own = {"ks_bs": 1, "clamp_ks_factor": 1.0, "cs_factor": 1.0, "mse_factor": 1.0, "tau": 0.07}
        rest = {"v_weight_decay": 1e-3, "norm_factor": 1e-3}
        names = {"delta_init": "target_init", "weight_decay_method": "norm"}
        return {**super().defaults(hp), **own, **rest, **names}

    @classmethod
    def check(cls, settings: Mapping[str, Any], hparams: RLSEditHyperParams) -> None:
        """See that these are settings of this editor."""
        n_0 = settings.get("mom2_update_weight")
        first = {"mom2_update_weight": n_0[0]} if isinstance(n_0, list) and n_0 else {}
        super().check({**settings, **first}, hparams)

    def complete(self, settings: dict[str, Any]) -> dict[str, Any]:
        """With a weight of the moments for each layer."""
        n_0 = settings["mom2_update_weight"]
        weights = n_0 if isinstance(n_0, list) else [n_0] * len(settings["layers"])
        return {**super().complete(settings), "mom2_update_weight": weights}

    def globals(self, fronts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """With terms that leave a change of zero out.

        Its cosine with other changes is not defined there, and the gradient of 1e12 would hold Adam still for
        all steps. EasyEdit begins at zero where hidden states are longer than 100.
        """
        place = "eamet.compute_z"
        theirs = vars(importlib.import_module(f"easyeditor.models.{place}"))["keep_cs_structure"]

        def terms(others: Any, which: Any, alike: Any, delta: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
            if delta.any():
                collision, mse = theirs(others, which, alike, delta, **rest)
                return collision, mse
            return delta.sum() * 0, delta.sum() * 0

        return {**super().globals(fronts), place: {"keep_cs_structure": terms}}

    def apply(self, requests: Sequence[dict[str, Any]]) -> Any:
        """Edit; the tokenizer adds start tokens behind it if it did before."""
        before = getattr(self.tok, "add_bos_token", None)
        try:
            return super().apply(requests)
        finally:
            if before is not None:
                self.tok.add_bos_token = before
            elif hasattr(self.tok, "add_bos_token"):
                del self.tok.add_bos_token
