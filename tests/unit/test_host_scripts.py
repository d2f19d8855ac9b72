"""RLSEdit joins the methods that a script knows; needs no EasyEdit."""

import ast
from pathlib import Path

import pytest

from easyedit_rls import HostError
from easyedit_rls.host.scripts import compile_with_ours

CHAIN = """
class ROMEHyperParams: pass
class MEMITHyperParams: pass
if args.editing_method == 'ROME':
    chosen = ROMEHyperParams
elif args.editing_method == 'MEMIT' or args.editing_method.lower() == 'memit':
    chosen = MEMITHyperParams
else:
    raise NotImplementedError
"""
TABLES = """
class ROMEHyperParams: pass
METHODS = {"ROME": ROMEHyperParams}
chosen = METHODS[args.editing_method]
ways = {"ROME": "rome's way", "MEMIT": "memit's way"}
way = ways[args.editing_method]
alike = args.editing_method in ['ROME', 'MEMIT']
others = args.editing_method in ['FT', 'LoRA']
"""


def run(source: str, method: str, tmp_path: Path, arguments=()):
    path = tmp_path / "script.py"
    path.write_text(source)
    code, folder = compile_with_ours(path, arguments)
    names = {
        "args": type("Args", (), {"editing_method": method})(),
        "RLSEditHyperParams": "ours",
        "MEMOIRHyperParams": "its",
    }
    exec(code, names)
    return names, folder


def test_a_chain_of_comparisons_gets_one_more_branch(tmp_path):
    assert run(CHAIN, "RLSEdit", tmp_path)[0]["chosen"] == "ours"
    assert run(CHAIN, "MEMOIR", tmp_path)[0]["chosen"] == "its"
    assert run(CHAIN, "ROME", tmp_path)[0]["chosen"].__name__ == "ROMEHyperParams"
    assert run(CHAIN, "MEMIT", tmp_path)[0]["chosen"].__name__ == "MEMITHyperParams"
    with pytest.raises(NotImplementedError):
        run(CHAIN, "Nonsense", tmp_path)


@pytest.mark.parametrize(("method", "settings"), [("RLSEdit", "ours"), ("MEMOIR", "its")])
def test_tables_and_lists_get_one_more_entry(tmp_path, method, settings):
    names, _ = run(TABLES, method, tmp_path)
    assert (names["chosen"], names["way"], names["alike"], names["others"]) == (
        settings,
        "memit's way",
        True,
        False,
    )


def test_a_method_that_a_script_knows_by_itself_stays(tmp_path):
    own = "elif args.editing_method == 'MEMOIR':\n    chosen = MEMOIRHyperParams\nelse:"
    assert "else:" in CHAIN
    source = "class MEMOIRHyperParams: pass\n" + CHAIN.replace("else:", own)
    assert run(source, "MEMOIR", tmp_path)[0]["chosen"] != "its"
    tables = TABLES.replace('"MEMIT": "memit\'s way"', '"MEMIT": "memit\'s way", "MEMOIR": "its own way"')
    assert run(tables, "MEMOIR", tmp_path)[0]["way"] == "its own way"


def test_a_script_without_a_choice_is_refused(tmp_path):
    with pytest.raises(HostError, match=r"script\.py offers no choice of methods"):
        run("print('hello')", "RLSEdit", tmp_path)


@pytest.mark.parametrize(("arguments", "folder"), [
    ((), "./output"),
    (("--metrics_save_dir", "there"), "there"),
    (("--ds_size", "3", "--metrics_save_dir=here"), "here"),
])  # fmt: skip
def test_the_folder_for_results_is_known(tmp_path, arguments, folder):
    source = (
        "import argparse\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--metrics_save_dir', default='./output', type=str)\n"
    )
    assert run(source + CHAIN, "RLSEdit", tmp_path, arguments)[1] == folder


def test_line_numbers_stay_those_of_the_file(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(CHAIN + "1 / 0\n")
    code, _ = compile_with_ours(path)
    with pytest.raises(ZeroDivisionError) as caught:
        exec(code, {"args": type("Args", (), {"editing_method": "ROME"})()})
    assert caught.traceback[-1].lineno + 1 == len(path.read_text().splitlines())
    assert ast.parse(path.read_text())  # and the file is as it was
