"""A rule by its name and settings."""

from collections.abc import Mapping
from typing import Any

from easyedit_rls.errors import HyperParamsError
from easyedit_rls.registry import Registry
from easyedit_rls.solvers.base import LayerSolver
from easyedit_rls.solvers.rls import RecursiveLeastSquares


def find_rule(name: str, settings: Mapping[str, Any] | None = None) -> type[LayerSolver]:
    """The rule of a name.

    Raises:
        HyperParamsError: the name or a setting is unknown.
    """
    known: Registry[type[LayerSolver]] = Registry("solver", "easyedit_rls.solvers", ())
    known.register("rls")(RecursiveLeastSquares)
    if settings:
        raise HyperParamsError(f"Solver {name} has no setting {', '.join(settings)}. Leave it out.")
    return known.get(name)


def describe_rules() -> str:
    """All solvers, a line each, for help texts."""
    return "rls: no settings"
