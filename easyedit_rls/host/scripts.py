"""Runs EasyEdit's own scripts with this package's methods among those they know.

The scripts choose the class of settings from ``--editing_method``, each by a chain of comparisons or a table
of its own, and refuse other names. The script's file is run as it is on disk, but for one more branch a
method, which is added to its syntax tree in memory.
"""

import argparse
import ast
import copy
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType, ModuleType

from easyedit_rls._base.files import user_path
from easyedit_rls.errors import HostError
from easyedit_rls.host.find import add_checkout, easyeditor, is_checkout
from easyedit_rls.host.registration import SETTINGS, register, registered

_PEERS = {"MEMIT", "AlphaEdit"}  # where a script treats these alike, ours are treated alike too
_RESULT_FOLDERS = {"--metrics_save_dir", "--output_dir", "--results_dir"}


def run_script(script: str | Path, arguments: Sequence[str]) -> None:
    """Run one script of an EasyEdit checkout as ``python SCRIPT ARGUMENTS`` would, with our methods
    registered and selectable.

    The folder that results go to is made if it is missing (some scripts only find out at the end that it is).

    Args:
        script: path of the script, from here or from the checkout's folder.
        arguments: the script's own arguments.

    Raises:
        HostError: no EasyEdit, no such script, or nowhere in it a method is chosen.
    """
    path = _find_script(user_path(script))
    easyeditor()
    register()
    ours = registered()
    code, folder = compile_with_ours(path, arguments, ours)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)

    main = ModuleType("__main__")
    main.__dict__.update(__file__=str(path), __builtins__=__builtins__)
    main.__dict__.update({name: getattr(easyeditor(), name) for name in ours.values()})
    before = sys.modules["__main__"], sys.argv, list(sys.path)
    sys.modules["__main__"], sys.argv = main, [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    try:
        exec(code, main.__dict__)
    finally:
        sys.modules["__main__"], sys.argv, sys.path[:] = before


def compile_with_ours(
    path: Path, arguments: Sequence[str] = (), ours: Mapping[str, str] = SETTINGS
) -> tuple[CodeType, str | None]:
    """A script with our methods selectable, and the folder it will write its results to, if that can be told.

    Raises:
        HostError: the script chooses no method by its name.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    branches = _Branches(ours)
    tree = ast.fix_missing_locations(branches.visit(tree))
    if not branches.n_selections:
        raise HostError(
            f"{path} offers no choice of methods by their settings' class that RLSEdit could join. "
            "Choose another script, or call easyedit_rls.register() in it and set the hparams yourself."
        )
    return compile(tree, str(path), "exec", dont_inherit=True), _result_folder(tree, arguments)


class _Branches(ast.NodeTransformer):
    """Adds our methods wherever a script tells methods apart."""

    def __init__(self, ours: Mapping[str, str]) -> None:
        self.n_selections, self._ours = 0, ours

    def visit_If(self, node: ast.If) -> ast.AST:
        """``if method == 'X': hparams = XHyperParams elif …`` gets a branch for each of ours in front."""
        chosen = _chosen_class(node)
        if chosen is None:
            return self.generic_visit(node)
        method, target = chosen
        self.n_selections += 1
        branches = node
        for name, settings in self._missing(ast.walk(node)).items():
            test = ast.Compare(copy.deepcopy(method), [ast.Eq()], [ast.Constant(name)])
            select = ast.Assign([copy.deepcopy(target)], ast.Name(settings, ast.Load()))
            branches = ast.copy_location(ast.If(test, [select], [branches]), node)
        return branches

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        """``{'X': XHyperParams, …}`` gets an entry; a table of functions by method name gets MEMIT's."""
        self.generic_visit(node)
        table = {
            key.value: value for key, value in zip(node.keys, node.values) if isinstance(key, ast.Constant)
        }
        if any(_is_settings_class(value) for value in table.values()):
            self.n_selections += 1
            missing: dict[str, ast.expr] = {
                name: ast.Name(settings, ast.Load()) for name, settings in self._ours.items()
            }
        elif "MEMIT" in table:
            missing = {name: copy.deepcopy(table["MEMIT"]) for name in self._ours}
        else:
            missing = {}
        for name, value in missing.items():
            if name not in table:
                node.keys.append(ast.Constant(name))
                node.values.append(value)
        return node

    def visit_List(self, node: ast.List) -> ast.AST:
        """``['ROME', 'MEMIT']``, in a test or as argparse's choices, gets ours."""
        self.generic_visit(node)
        texts = {
            item.value for item in node.elts if isinstance(item, ast.Constant) and isinstance(item.value, str)
        }
        if texts & _PEERS and len(texts) == len(node.elts):
            node.elts += [ast.Constant(name) for name in self._ours if name not in texts]
        return node

    def _missing(self, nodes: Iterable[ast.AST]) -> dict[str, str]:
        """Our methods that a script doesn't know by itself."""
        named = {node.value for node in nodes if isinstance(node, ast.Constant)}
        return {name: settings for name, settings in self._ours.items() if name not in named}


def _chosen_class(node: ast.If) -> tuple[ast.expr, ast.expr] | None:
    """What is compared, and what the class of settings is assigned to, if this `if` chooses a method."""
    test, body = node.test, node.body[0]
    if isinstance(test, ast.BoolOp):
        test = test.values[0]
    if not (
        isinstance(test, ast.Compare)
        and isinstance(test.ops[0], ast.Eq)
        and isinstance(test.comparators[0], ast.Constant)
    ):
        return None
    method = test.left
    name = method.attr if isinstance(method, ast.Attribute) else getattr(method, "id", "")
    if name == "editing_method" and isinstance(body, ast.Assign) and _is_settings_class(body.value):
        return method, body.targets[0]
    return None


def _is_settings_class(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id.endswith(("HyperParams", "Hparams", "HParams"))


def _result_folder(tree: ast.AST, arguments: Sequence[str]) -> str | None:
    """The value of the script's option that names the folder for results: as given, or by default."""
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)
    ]
    for call in calls:
        option = call.args[0].value  # type: ignore[attr-defined]
        if option in _RESULT_FOLDERS:
            parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
            defaults = [
                keyword.value.value
                for keyword in call.keywords
                if keyword.arg == "default" and isinstance(keyword.value, ast.Constant)
            ]
            parser.add_argument(option, dest="folder", default=next(iter(defaults), None))
            folder: str | None = parser.parse_known_args(list(arguments))[0].folder
            return folder
    return None


def _find_script(script: Path) -> Path:
    """The script's absolute path; its own checkout is put on the import path if none is known yet."""
    if script.is_file():
        checkout = next((folder for folder in script.absolute().parents if is_checkout(folder)), None)
        if checkout is not None and "easyeditor" not in sys.modules:
            add_checkout(checkout)
        return script.absolute()
    package = easyeditor()
    inside = Path(str(package.__file__)).parents[1] / script
    if not inside.is_file():
        raise HostError(
            f"No script {script.absolute()}, nor {inside}. Give its path from here or from EasyEdit's folder."
        )
    return inside
