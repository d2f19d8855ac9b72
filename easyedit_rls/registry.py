"""Names of solvers and editors: what this package has, and what others add by entry points.

An outsider's `pyproject.toml` says, for a solver and for an editor,

    [project.entry-points."easyedit_rls.solvers"]
    my_rule = "my_package.my_rule"

    [project.entry-points."easyedit_rls.editors"]
    MyEditor = "my_package.my_editor"

and the module registers its class under that name with `register_solver` or `register_editor`.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from easyedit_rls.errors import HyperParamsError

T = TypeVar("T", bound=type)


class Registry(Generic[T]):
    """Classes by name.

    Args:
        kind: what they are, for messages: 'solver'.
        group: of entry points, where other packages name theirs.
        packages: of this package, whose modules register theirs when they are imported; they are imported
            when a name is first asked for.
    """

    def __init__(self, kind: str, group: str, packages: Sequence[str]) -> None:
        self.kind, self.group, self._packages = kind, group, tuple(packages)
        self._classes: dict[str, T] = {}
        self._refused: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that gives a class its name.

        Raises:
            HyperParamsError: another class has it.
        """

        def decorate(cls: T) -> T:
            other = self._classes.get(name, cls)
            if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
                raise HyperParamsError(
                    f"Two {self.kind}s are named {name!r}: {other.__module__}.{other.__qualname__} "
                    f"and {cls.__module__}.{cls.__qualname__}. Rename one."
                )
            self._classes[name] = cls
            return cls

        return decorate

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Names that people may look for here, and why there is no class: a sentence's rest behind the name,
        the cure last.
        """
        self._refused |= reasons

    def refused(self) -> dict[str, str]:
        """These names with their reasons."""
        self._import_own()
        return dict(self._refused)

    def names(self) -> list[str]:
        """All names, in alphabetical order; those of entry points too, without importing them."""
        self._import_own()
        foreign = {point.name for point in entry_points(group=self.group)}
        return sorted(self._classes.keys() | foreign, key=str.lower)

    def get(self, name: str) -> T:
        """The class of a name.

        Raises:
            HyperParamsError: there is none; says why, or which name may be meant. Or an entry point's module
                does not register the name that it was given.
        """
        self._import_own()
        if name not in self._classes:
            for point in entry_points(group=self.group, name=name):
                try:
                    point.load()
                except ImportError as exc:
                    raise HyperParamsError(
                        f"The entry point {name} = {point.value} of {self.group} can't be imported: {exc}. "
                        "Mend the package that brings it, or uninstall it."
                    ) from exc
                if name not in self._classes:
                    raise HyperParamsError(
                        f"The entry point {name} = {point.value} of {self.group} registers no {self.kind} "
                        f"of that name. Put @register_{self.kind}({name!r}) on its class."
                    )
        if name in self._classes:
            return self._classes[name]
        if name in self._refused:
            raise HyperParamsError(f"{name} {self._refused[name]}")
        close = difflib.get_close_matches(name.lower(), [known.lower() for known in self.names()], n=1)
        meant = [known for known in self.names() if known.lower() in close]
        hint = f" Did you mean {meant[0]}?" if meant else ""
        raise HyperParamsError(f"There is no {self.kind} {name!r}.{hint} Known: {', '.join(self.names())}.")

    def _import_own(self) -> None:
        for package in self._packages:
            for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
                importlib.import_module(f"{package}.{module.name}")
