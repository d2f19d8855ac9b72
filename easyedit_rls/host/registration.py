"""Makes this package's methods EasyEdit's: ``alg_name: RLSEdit``, and ``alg_name: MEMOIR``."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HostError
from easyedit_rls.host.apply import apply_rls_to_model
from easyedit_rls.host.find import easyeditor
from easyedit_rls.host.hparams import host_hyperparams
from easyedit_rls.host.memoir import apply_memoir_to_model, host_memoir_hyperparams


@dataclass(frozen=True)
class _Method:
    """A method as EasyEdit knows it.

    Attributes:
        name: its `alg_name`.
        apply: what edits a batch.
        apply_name, settings_name: names of that, and of the settings' class, in ``easyeditor``.
        settings: makes that class.
        may_be_theirs: whether EasyEdit's own method of that name takes precedence.
    """

    name: str
    apply: Callable[..., Any]
    apply_name: str
    settings_name: str
    settings: Callable[[], type]
    may_be_theirs: bool = False

    @property
    def names(self) -> tuple[str, str]:
        """In the ``easyeditor`` namespace."""
        return self.settings_name, self.apply_name

    def taken(self, package: ModuleType, algorithms: dict[str, Any]) -> list[str]:
        """Names of its that belong to something else."""
        found = [f"easyeditor.{name}" for name in self.names if hasattr(package, name)]
        return found + ([f"ALG_DICT['{self.name}']"] if self.name in algorithms else [])


_RLSEDIT = _Method(
    "RLSEdit", apply_rls_to_model, "apply_rls_to_model", "RLSEditHyperParams", host_hyperparams
)
_MEMOIR = _Method(
    "MEMOIR",
    apply_memoir_to_model,
    "apply_memoir_to_model",
    "MEMOIRHyperParams",
    host_memoir_hyperparams,
    True,
)
_METHODS = (_RLSEDIT, _MEMOIR)
SETTINGS = {
    method.name: method.settings_name for method in _METHODS
}  # name of a method -> of its settings' class


def register() -> type[RLSEditHyperParams]:
    """Make RLSEdit and MEMOIR known to EasyEdit: to every editor, as methods that edit in batches, and in the
    ``easyeditor`` namespace. A MEMOIR of EasyEdit's own stays what it is.

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
    if not is_registered():
        waiting = [m for m in _METHODS if not (m.may_be_theirs and m.taken(package, algorithms))]
        if taken := [name for method in waiting for name in method.taken(package, algorithms)]:
            raise HostError(
                f"{', '.join(taken)} of {package.__name__} at {_place(package)} is taken by something else. "
                "Remove that, or use it."
            )
        classes = {method: method.settings() for method in waiting}
        for method, cls in classes.items():
            algorithms[method.name] = method.apply
            setattr(package, method.settings_name, cls)
            setattr(package, method.apply_name, method.apply)
        batch_editor.is_batchable_method = staticmethod(_Batchable(batch_editor.is_batchable_method))
    hyperparams: type[RLSEditHyperParams] = package.RLSEditHyperParams
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
    for method in _METHODS:
        if algorithms.get(method.name) is method.apply:
            del algorithms[method.name]
            for name in method.names:
                delattr(package, name)
    if isinstance(
        batch_editor.is_batchable_method, _Batchable
    ):  # else somebody wrapped it again; ours then asks the table in vain
        batch_editor.is_batchable_method = staticmethod(batch_editor.is_batchable_method.original)


def is_registered() -> bool:
    """Whether ``alg_name: RLSEdit`` is this package's.

    Raises:
        HostError: EasyEdit is missing.
    """
    return _is_ours(_RLSEDIT)


def registered() -> dict[str, str]:
    """Names of the methods that EasyEdit has from this package now, with those of their settings' classes.

    Raises:
        HostError: EasyEdit is missing.
    """
    return {method.name: method.settings_name for method in _METHODS if _is_ours(method)}


def _is_ours(method: _Method) -> bool:
    return _tables()[0].get(method.name) is method.apply


class _Batchable:
    """EasyEdit's test for methods that edit in batches, with ours among them while they are registered."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(self, alg_name: str) -> bool:
        ours = any(method.name == alg_name and _is_ours(method) for method in _METHODS)
        return ours or bool(self.original(alg_name))


def _tables() -> tuple[dict[str, Any], Any]:
    """EasyEdit's table of methods, and the class that knows which of them edit in batches."""
    easyeditor()
    from easyeditor.editors.batch_editor import BatchEditor
    from easyeditor.util.alg_dict import ALG_DICT

    return ALG_DICT, BatchEditor


def _place(package: ModuleType) -> str:
    return str(package.__file__)
