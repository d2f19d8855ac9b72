"""RLSEdit's settings as a class of EasyEdit's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.host.find import easyeditor


def host_hyperparams() -> type[RLSEditHyperParams]:
    """A subclass of both `easyedit_rls.RLSEditHyperParams` and EasyEdit's ``HyperParams``.

    It reads files as EasyEdit does (YAML or JSON, ``1e-1`` as a number, ``alg`` for ``alg_name``) and checks
    them as we do.

    Raises:
        HostError: EasyEdit is missing.
    """
    package = easyeditor()
    from easyeditor.util.hparams import HyperParams, load_hparams_config, normalize_alg_name

    @dataclass
    class HostRLSEditHyperParams(RLSEditHyperParams, HyperParams):  # type: ignore[misc]  # its base is known at run time only
        __doc__ = RLSEditHyperParams.__doc__

        def __post_init__(self) -> None:
            if (
                isinstance(self.device, float) and self.device.is_integer()
            ):  # EasyEdit reads device: "0" as 0.0
                self.device = int(self.device)
            super().__post_init__()

        @classmethod
        def _load(cls, path: Path) -> Any:
            try:
                return normalize_alg_name(load_hparams_config(str(path)), "RLSEdit")
            except ValueError as exc:
                raise HyperParamsError(f"{path}: {exc} Set alg_name: RLSEdit.") from exc

    # It is found, and pickled, as what it is registered as
    HostRLSEditHyperParams.__name__ = HostRLSEditHyperParams.__qualname__ = "RLSEditHyperParams"
    HostRLSEditHyperParams.__module__ = package.__name__
    return HostRLSEditHyperParams
