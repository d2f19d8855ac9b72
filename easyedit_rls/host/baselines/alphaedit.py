"""AlphaEdit, and SPHERE on top of it: MEMIT's values, written into the null space of ordinary keys."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.editors.base import register_editor
from easyedit_rls.errors import LayoutError
from easyedit_rls.host.baselines.located import Located


@register_editor("AlphaEdit")
class AlphaEdit(Located):
    """Fang et al. 2025, arXiv 2410.02355."""

    alg_name, module = "AlphaEdit", "alphaedit.AlphaEdit_main"
    settings_class = ("alphaedit.AlphaEdit_hparams", "AlphaEditHyperParams")

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """MEMIT's with the null space's."""
        own = {"nullspace_threshold": 2e-2, "L2": 10.0, "P_loc": f"{hp.stats_dir}/none.pt"}
        return {**super().defaults(hp), **own}

    def globals(self, fronts: Sequence[str]) -> dict[str, dict[str, Any]]:
        """With projections and the sum of keys; P_loc would be looked for, and P written into the working
        folder, if there were none.
        """
        found = super().globals(fronts)
        found[self.module] |= {"P": None, "P_loaded": True, "cache_c": None, "cache_c_new": True}
        return found

    def prepare(self) -> None:
        """Make the projections, and a history of no keys."""
        theirs: Any = importlib.import_module(f"easyeditor.models.{self.module}")
        found = [
            theirs.get_project(self.model, self.tok, layer, self.settings).cpu()
            for layer in self.settings.layers
        ]
        theirs.P = torch.stack(found)
        theirs.cache_c = torch.zeros_like(theirs.P)
        torch.save(theirs.P, self.settings.P_loc)

    def memory(self) -> dict[str, Tensor]:
        """The sum of the keys of all edits."""
        return {"cache_c": self.state[self.module]["cache_c"]}

    def remember(self, memory: Mapping[str, Tensor], n_batches: int) -> bool:
        """Put that sum back."""
        self.state[self.module]["cache_c"] = memory["cache_c"]
        return super().remember(memory, n_batches)


@register_editor("SPHERE")
class SPHERE(AlphaEdit):
    """AlphaEdit's step without its part along the weight's leading directions."""

    alg_name, module = "SPHERE", "SPHERE.SPHERE_main"
    settings_class = ("SPHERE.SPHERE_hparams", "SPHEREHyperParams")

    @classmethod
    def defaults(cls, hp: RLSEditHyperParams) -> dict[str, Any]:
        """With what EasyEdit ships."""
        return {**super().defaults(hp), "cumulative_ratio": 0.5, "suppression_strength": 0.5}

    def prepare(self) -> None:
        """See that the weights are of the kind whose rows it means.

        Raises:
            LayoutError: they aren't.
        """
        super().prepare()
        for layer in self.settings.layers:
            module = self.model.get_submodule(self.settings.rewrite_module_tmp.format(layer))
            if not isinstance(module, torch.nn.Linear):
                raise LayoutError(
                    f"SPHERE projects the inputs of nn.Linear, but layer {layer} has a "
                    f"{type(module).__name__}. Leave SPHERE out for this model."
                )
