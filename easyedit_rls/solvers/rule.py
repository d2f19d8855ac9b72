"""A rule by its name and settings: `rls`, `memit_seq-rect`, `memit_seq-sphere-ote`.

Behind the solver stand filters of its step, in the order in which they work, and last `ote` where their error
is fed back.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from easyedit_rls._base.settings import read_settings, searched
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
        filters: of its step, by name, in the order in which they work.
        feeds_back: whether what they take away is fed back.
    """

    solver: type[LayerSolver]
    settings: Any
    filters: Mapping[str, Filter] = field(default_factory=dict)
    feeds_back: bool = False

    def describe(self) -> dict[str, Any]:
        """All settings by name, as `find_rule` takes them; a filter's in a block of its name."""
        return asdict(self.settings) | {name: asdict(one.settings) for name, one in self.filters.items()}

    def searched(self) -> dict[str, tuple[float, float]]:
        """Its numbers that are worth a search, and from where to where; a filter's behind its name and a
        dot.
        """
        found = searched(type(self.settings))
        for filter_name, one in self.filters.items():
            found |= {f"{filter_name}.{name}": span for name, span in searched(type(one.settings)).items()}
        return found

    @property
    def has_covariance(self) -> bool:
        """Whether a gate can go by it: it keeps a covariance, and no filter changes what that stands for."""
        return self.solver.covariance is not LayerSolver.covariance and not self.filters

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
        filters = tuple(self.filters.values())
        return FilteredSolver.around(inner, filters, self.feeds_back) if filters else inner

    def from_tensors(self, stored: Mapping[str, Tensor], name: str) -> tuple[LayerSolver, LayerSolver | None]:
        """The state that `LayerSolver.tensors` was taken from, and the one before it; see there."""
        filters = tuple(self.filters.values())
        if filters:
            return FilteredSolver.read(stored, name, self.solver, self.settings, filters)
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
    filters = {}
    for part in behind:
        found, own = FILTERS.get(part), given.pop(part, {})
        if not isinstance(own, Mapping):
            raise HyperParamsError(
                f"Settings of the filter {part} are {own!r}, not a block of settings by name."
            )
        if part in filters:
            raise HyperParamsError(f"Solver {name!r} has the filter {part} twice. Leave one out.")
        filters[part] = found(read_settings(found.Settings, own, f"filter {part}"))
    solver = SOLVERS.get(solver_name)
    own = read_settings(solver.Settings, given, f"solver {solver_name}")
    return Rule(solver, own, filters, feeds_back)


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
