"""Makes RLSEdit a method of EasyEdit: ``alg_name: RLSEdit``."""

from types import ModuleType
from typing import Any

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HostError
from easyedit_rls.host.apply import apply_rls_to_model
from easyedit_rls.host.find import easyeditor
from easyedit_rls.host.hparams import host_hyperparams

ALG_NAME = "RLSEdit"


def register() -> type[RLSEditHyperParams]:
    """Make RLSEdit known to EasyEdit: to every editor, as a method that edits in batches, and in the
    ``easyeditor`` namespace.

    May be called again and again. Importing EasyEdit for the first time seeds the global random generators,
    as it always does.

    Returns:
        ``easyeditor.RLSEditHyperParams``, a subclass of EasyEdit's ``HyperParams``.

    Raises:
        HostError: EasyEdit is missing, or one of the names belongs to something else. Nothing is changed
            then.
    """
    package = easyeditor()
    algorithms, batch_editor = _tables()
    if is_registered():
        hyperparams: type[RLSEditHyperParams] = package.RLSEditHyperParams
        return hyperparams
    taken = [
        f"easyeditor.{name}"
        for name in ("RLSEditHyperParams", "apply_rls_to_model")
        if hasattr(package, name)
    ]
    taken += [f"ALG_DICT['{ALG_NAME}']"] if ALG_NAME in algorithms else []
    if taken:
        raise HostError(
            f"{', '.join(taken)} of {package.__name__} at {_place(package)} is taken by something else. "
            "Remove that, or use it."
        )

    hyperparams = host_hyperparams()
    algorithms[ALG_NAME] = apply_rls_to_model
    batch_editor.is_batchable_method = staticmethod(_Batchable(batch_editor.is_batchable_method))
    package.RLSEditHyperParams = hyperparams  # type: ignore[attr-defined]
    package.apply_rls_to_model = apply_rls_to_model  # type: ignore[attr-defined]
    return hyperparams


def unregister() -> None:
    """Take everything back that `register` did; does nothing where RLSEdit isn't registered.

    Raises:
        HostError: EasyEdit is missing.
    """
    package = easyeditor()
    if not is_registered():
        return
    algorithms, batch_editor = _tables()
    del algorithms[ALG_NAME], package.RLSEditHyperParams, package.apply_rls_to_model
    if isinstance(
        batch_editor.is_batchable_method, _Batchable
    ):  # else somebody wrapped it again; ours then asks the table in vain
        batch_editor.is_batchable_method = staticmethod(batch_editor.is_batchable_method.original)


def is_registered() -> bool:
    """Whether ``alg_name: RLSEdit`` is this package's.

    Raises:
        HostError: EasyEdit is missing.
    """
    return _tables()[0].get(ALG_NAME) is apply_rls_to_model


class _Batchable:
    """EasyEdit's test for methods that edit in batches, with RLSEdit among them while it is registered."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, alg_name: str) -> bool:
        return (alg_name == ALG_NAME and is_registered()) or bool(self.original(alg_name))


def _tables() -> tuple[dict[str, Any], Any]:
    """EasyEdit's table of methods, and the class that knows which of them edit in batches."""
    easyeditor()
    from easyeditor.editors.batch_editor import BatchEditor
    from easyeditor.util.alg_dict import ALG_DICT

    return ALG_DICT, BatchEditor


def _place(package: ModuleType) -> str:
    return str(package.__file__)
