"""ROME and R-ROME: one fact, one layer, one rank."""

from collections.abc import Sequence
from typing import Any, ClassVar

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.base import register_editor
from easyedit_rls.host.baselines.base import MODULES, EasyEditBaseline, some
from easyedit_rls.host.baselines.located import MOMENTS, VALUES


@register_editor("ROME")
class ROME(EasyEditBaseline):
    """Meng et al. 2022, arXiv 2202.05262."""

    alg_name = "ROME"
    package: ClassVar[str] = "rome"
    settings_class = ("rome.rome_hparams", "ROMEHyperParams")
    takes_batches = False
    needs_moments = True

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """One of RLSEdit's layers, its value optimization and moments."""
        return {
            **some(hp, *MODULES, *VALUES, *MOMENTS),
            "fact_token": "subject_last",
            "layers": [hp.layers[len(hp.layers) // 2]],
            "mom2_adjustment": True,
            "context_template_length_params": [[5, 10], [10, 10]],
        }

    def globals(self, fronts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Context templates and inverted moments."""
        return {
            f"{self.package}.{self.package}_main": {"CONTEXT_TEMPLATES_CACHE": ["{}", *fronts]},
            f"{self.package}.compute_u": {"inv_mom2_cache": {}},
        }


@register_editor("R-ROME")
class RROME(ROME):
    """ROME with one key for both its places; Gupta et al. 2024, arXiv 2403.07175."""

    alg_name, package = "R-ROME", "r_rome"
    settings_class = ("r_rome.r_rome_hparams", "R_ROMEHyperParams")
