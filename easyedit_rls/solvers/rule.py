"""A rule by its name and settings: `rls`, `memit_seq-rect`, `memit_seq-sphere-ote`.

Behind the solver stand filters of its step, in the order in which they work, and last `ote` where their error
is fed back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from easyedit_rls._base.settings import read_settings
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.solvers.base import SOLVERS, LayerSolver
from easyedit_rls.solvers.filtered import FILTERS, Filter, FilteredSolver
from easyedit_rls.solvers.prior import Prior

FEEDBACK = "ote"


@dataclass(frozen=True)
class Rule:
    """An update rule, ready to begin.

    Attributes:
        solver: its class.
        settings: of the class's `Settings`.
        filters: of its step.
        feeds_back: whether what they take away is fed back.
    """

    solver: type[LayerSolver]
    settings: Any
    filters: tuple[Filter, ...] = ()
    feeds_back: bool = False

    @property
    def can_retract(self) -> bool:
        """Whether edits can be taken out; a filter breaks that."""
        return self.solver.can_retract and not self.filters

    def begin(self, prior: Prior) -> LayerSolver:
        """The state of a layer before the first edit.

        Raises:
            NumericalError: the rule can't begin with this prior.
            AnchorError: it needs second moments that the prior lacks.
            HyperParamsError: the rule has no matrix for `ote`.
        """
        inner = self.solver(prior, self.settings)
        return FilteredSolver.around(inner, self.filters, self.feeds_back) if self.filters else inner

    def from_tensors(self, stored: Mapping[str, Tensor], name: str) -> tuple[LayerSolver, LayerSolver | None]:
        """The state that `LayerSolver.tensors` was taken from, and the one before it; see there."""
        if self.filters:
            return FilteredSolver.read(stored, name, self.solver, self.settings, self.filters)
        return self.solver.from_tensors(stored, name, self.settings)


def find_rule(name: str, settings: Mapping[str, Any] | None = None) -> Rule:
    """The rule of a name.

    Args:
        name: of a solver, and behind hyphens filters; see above.
        settings: the solver's by name; a filter's in a block of its name.

    Raises:
        HyperParamsError: a name or a setting is unknown, or a setting out of range.
    """
    solver_name, *behind = name.split("-")
    given = dict(settings or {})
    feeds_back = behind[-1:] == [FEEDBACK]
    behind = behind[:-1] if feeds_back else behind
    if FEEDBACK in behind or (feeds_back and not behind):
        raise HyperParamsError(
            f"Solver {name!r}: {FEEDBACK} feeds back what filters take away, and stands last, behind them: "
            f"{solver_name}-rect-{FEEDBACK}."
        )
    filters = []
    for part in behind:
        found, own = FILTERS.get(part), given.pop(part, {})
        if not isinstance(own, Mapping):
            raise HyperParamsError(
                f"Settings of the filter {part} are {own!r}, not a block of settings by name."
            )
        filters.append(found(read_settings(found.Settings, own, f"filter {part}")))
    solver = SOLVERS.get(solver_name)
    return Rule(
        solver, read_settings(solver.Settings, given, f"solver {solver_name}"), tuple(filters), feeds_back
    )


def rule_of(settings: Mapping[str, Any]) -> Rule:
    """The rule that settings ask for: `solver` and `solver_settings`, and `forgetting_factor` and
    `forgetting_memory`, which make rls the rule that forgets.

    Raises:
        HyperParamsError: see `find_rule`; or edits shall fade under a rule that can't let them.
    """
    name, factor = settings["solver"], settings["forgetting_factor"]
    if factor == 1:
        return find_rule(name, settings["solver_settings"])
    if name != "rls":
        raise HyperParamsError(
            f"Setting forgetting_factor is {factor!r}, but solver {name} lets nothing fade so. "
            "Leave it at 1, or take solver: rls."
        )
    return find_rule("forgetting", {"factor": factor, "memory": settings["forgetting_memory"]})


def describe_rules() -> str:
    """All solvers and filters with their settings and defaults, a line each, for help texts."""
    lines = []
    for kind, registry in (("", SOLVERS), ("-", FILTERS)):
        for name in registry.names():
            own = registry.get(name).Settings
            items = getattr(own, "__dataclass_fields__", {}).values()
            lines.append(
                f"{kind}{name}: "
                + (", ".join(f"{item.name} {item.default}" for item in items) or "no settings")
            )
    return "\n".join(lines)
