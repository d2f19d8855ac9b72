"""Where EasyEdit is: importable, or at ``EASYEDIT_HOME``."""

import ast
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from easyedit_rls._base.files import user_path
from easyedit_rls.errors import HostError

_CLONE = "git clone https://github.com/zjunlp/EasyEdit, and set EASYEDIT_HOME to its folder."


def easyeditor_is_there() -> bool:
    """Whether `easyeditor` would find a package to import; imports nothing."""
    home = os.environ.get("EASYEDIT_HOME")
    if "easyeditor" in sys.modules:
        return True
    return is_checkout(user_path(home)) if home else importlib.util.find_spec("easyeditor") is not None


def easyeditor() -> ModuleType:
    """Import EasyEdit and return its package.

    A package that is already imported is taken as it is; then the checkout at ``EASYEDIT_HOME``, then what
    Python finds by itself. Importing it seeds the global random generators with 42 and configures logging, as
    it does for every EasyEdit script.

    Raises:
        HostError: there is no checkout, or it can't be imported.
    """
    if "easyeditor" in sys.modules:
        return sys.modules["easyeditor"]
    home = os.environ.get("EASYEDIT_HOME")
    if home:
        add_checkout(user_path(home))
    elif importlib.util.find_spec("easyeditor") is None:
        raise HostError(f"EasyEdit is not importable and EASYEDIT_HOME is not set. {_CLONE}")
    try:
        return importlib.import_module("easyeditor")
    except ImportError as exc:
        raise HostError(
            f"EasyEdit is there but can't be imported: {exc}. Install what its requirements.txt lists."
        ) from exc


def add_checkout(home: Path) -> None:
    """Put a checkout in front of the import path.

    Raises:
        HostError: the folder holds no EasyEdit.
    """
    home = home.absolute()
    if not is_checkout(home):
        raise HostError(f"{home} holds no EasyEdit (no easyeditor/__init__.py). {_CLONE}")
    if str(home) not in sys.path:
        sys.path.insert(0, str(home))


def is_checkout(folder: Path) -> bool:
    """Whether a folder is a checkout of EasyEdit."""
    return (folder / "easyeditor" / "__init__.py").is_file()


def settings_fields(module: str, name: str) -> frozenset[str] | None:
    """The settings that a class of EasyEdit's has, read from its source: importing it takes seconds, and all
    of EasyEdit's requirements.

    Args:
        module: below `easyeditor.models`.
        name: of the class.

    Returns:
        Names; None where there is no EasyEdit.

    Raises:
        HostError: EasyEdit's checkout has no such class.
    """
    home = os.environ.get("EASYEDIT_HOME")
    if "easyeditor" in sys.modules:
        folders = list(sys.modules["easyeditor"].__path__)
    elif home:
        folders = [str(user_path(home) / "easyeditor")]
    else:
        spec = importlib.util.find_spec("easyeditor")
        folders = list(spec.submodule_search_locations or ()) if spec else []
    if not any(Path(folder).is_dir() for folder in folders):
        return None
    path = Path(folders[0], "models", *module.split(".")).with_suffix(".py")
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else ast.Module([], [])
    for found in tree.body:
        if isinstance(found, ast.ClassDef) and found.name == name:
            lines = (line.target for line in found.body if isinstance(line, ast.AnnAssign))
            return frozenset(target.id for target in lines if isinstance(target, ast.Name))
    raise HostError(f"There is no {name} in {path}. Take a newer EasyEdit: git pull in its folder.")
