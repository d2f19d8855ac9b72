"""Editors that change weights by gradients of the answer: FT and ULTRAEDIT."""

from collections.abc import Sequence
from typing import Any

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.base import register_editor
from easyedit_rls.host.baselines.base import MODULES, EasyEditBaseline, some


@register_editor("FT")
class FT(EasyEditBaseline):
    """Fine-tuning of the last of RLSEdit's layers."""

    alg_name = "FT"
    settings_class = ("ft.ft_hparams", "FTHyperParams")
    padding = "left"

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """What EasyEdit ships, on that layer."""
        own = {"num_steps": 25, "lr": 5e-4, "weight_decay": 0.0, "kl_factor": 0.0, "norm_constraint": False}
        goal = {"objective_optimization": "target_new", "batch_size": 1}
        return {**some(hp, *MODULES), "layers": [hp.layers[-1]], **own, **goal}


@register_editor("ULTRAEDIT")
class ULTRAEDIT(EasyEditBaseline):
    """One backward pass a fact; Gu et al. 2025, arXiv 2505.14679. EasyEdit makes its normalizer anew in each
    batch.
    """

    alg_name = "ULTRAEDIT"
    settings_class = ("ultraedit.ultraedit_hparams", "UltraEditHyperParams")
    padding = "left"

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """What EasyEdit ships, on RLSEdit's layers."""
        own = {"lr": 1e-6, "batch_size_once": 10, "editor_batch_size": 1024, "half": False, "batch_size": 1}
        names = {
            "model_class": "AutoModelForCausalLM",
            "tokenizer_class": "AutoTokenizer",
            "tokenizer_name": hp.model_name,
        }
        rest = {"dropout": 0.0, "no_grad_layers": None, "token": "mask", "silent": True, "results_dir": "."}
        modules = [hp.rewrite_module_tmp.format(layer) for layer in hp.layers]
        return {**own, **names, **rest, "inner_params": modules}

    def apply(self, requests: Sequence[dict[str, Any]]) -> Any:
        """Edit in passes of equal size, since EasyEdit drops what is left of the last one."""
        most = min(self.settings.batch_size_once, len(requests))
        once = next(n for n in range(most, 0, -1) if len(requests) % n == 0)
        wanted = self.settings.batch_size, self.settings.batch_size_once
        self.settings.batch_size, self.settings.batch_size_once = len(requests), once
        try:
            return super().apply(requests)
        finally:
            self.settings.batch_size, self.settings.batch_size_once = wanted
