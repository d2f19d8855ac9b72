"""An update rule from another package, 27 lines long: edit, roll back, ledger, resume, compare. And the rules
of this package through the same.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from easyedit_rls import HyperParamsError, RLSEditor
from easyedit_rls.cli.state import main as state_main
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_moment
from easyedit_rls.solvers.base import SOLVERS
from tests import zoo
from tests.conftest import REPOSITORY, tiny_llama, tiny_settings

SOLVER = '''
"""Ridge regression of each batch by itself: ΔW = (KᵀK + ρ I)^-1 Kᵀ r."""
from dataclasses import dataclass

import torch

from easyedit_rls._base.settings import setting
from easyedit_rls.solvers.base import register_solver
from easyedit_rls.solvers.step import StepSolver


@dataclass(frozen=True)
class RidgeSettings:
    rho: float = setting("The ridge.", 1.0, above=0)


@register_solver("ridge")
class Ridge(StepSolver):
    Settings = RidgeSettings
    looks_after = True

    def start(self, prior):
        return {"n_rows": torch.zeros(1)}

    def step(self, K, R):
        gram = K.T @ K + self.settings.rho * torch.eye(K.shape[1]).to(K)
        return torch.linalg.solve(gram, K.T @ R), dict(self.state)

    def after(self, K):
        return {"n_rows": self.state["n_rows"] + len(K)}
'''
OWN = {"threshold": 0.5, "L2": 0.1}
RULES = {
    "memit": {"n_0": 50}, "memit_seq": {"n_0": 50}, "emmet": {"n_0": 50}, "alphaedit": OWN,
    "betaedit": {"threshold": 0.5, "moment_weight": 50, "ridge": 0.1, "every": 2}, "evoedit": OWN,
    "lyaplock": {"n_0": 50}, "memit_seq-rect": {"n_0": 50}, "memit_seq-sphere-ote": {"n_0": 50},
    "rls-prune": {}, "rls-rect-ote": {}, "alphaedit-sphere": OWN, "ridge": {"rho": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The rule as an installed package."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "ridge-1.0.dist-info").mkdir()
    (folder / "ridge_rule.py").write_text(SOLVER, encoding="utf-8")
    meta = {
        "METADATA": "Metadata-Version: 2.1\nName: ridge\nVersion: 1.0\n",
        "entry_points.txt": "[easyedit_rls.solvers]\nridge = ridge_rule\n",
    }
    for name, content in meta.items():
        (folder / "ridge-1.0.dist-info" / name).write_text(content)
    return folder


@pytest.fixture(autouse=True)
def no_trace(monkeypatch):
    """Rules from outside are forgotten behind each test."""
    SOLVERS.names()  # this package's own are there before
    monkeypatch.setattr(SOLVERS, "_classes", dict(SOLVERS._classes))
    monkeypatch.delitem(sys.modules, "ridge_rule", raising=False)


def weights(editor):
    return {layer: weight.read() for layer, weight in editor.layout.edited.items()}


@pytest.mark.filterwarnings("ignore::easyedit_rls.errors.RLSEditWarning")
@pytest.mark.parametrize("name", RULES)
def test_a_rule_edits_rolls_back_is_kept_and_resumes(name, site, tok, requests, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    hparams = tiny_settings("llama", solver=name, solver_settings=RULES[name])
    with RLSEditor(zoo.make("llama"), tok, hparams, state_dir=tmp_path, show_progress=False) as editor:
        unedited = weights(editor)
        editor.edit(requests[:2])
        first = weights(editor)
        editor.edit(requests[2:])
        second = weights(editor)
        editor.rollback()
        assert all(torch.equal(weights(editor)[layer], W) for layer, W in first.items())
        editor.edit(requests[2:])
        assert all(torch.equal(weights(editor)[layer], W) for layer, W in second.items())
        assert all(not torch.equal(unedited[layer], W) for layer, W in second.items())
    journal = latest(tmp_path)
    for from_start in (False, True):  # by the checkpoint, and each change once more
        moment = read_moment(journal, from_start=from_start)
        assert all(torch.equal(moment.weight(layer), W) for layer, W in second.items())
    with RLSEditor(zoo.make("llama"), tok, hparams, state_dir=tmp_path, show_progress=False) as editor:
        assert all(torch.equal(weights(editor)[layer], W) for layer, W in second.items())
        if name != "memit_seq":
            with pytest.raises(HyperParamsError, match="can't take edits out"):
                editor.retract([1])
        assert all(torch.equal(weights(editor)[layer], W) for layer, W in second.items())
        editor.rollback()
        assert all(torch.equal(weights(editor)[layer], W) for layer, W in first.items())


def test_keys_are_seen_again_behind_the_batch(site, tok, requests, monkeypatch):
    monkeypatch.syspath_prepend(str(site))
    hparams = tiny_settings("llama", solver="ridge", solver_settings=RULES["ridge"])
    editor = RLSEditor(zoo.make("llama"), tok, hparams, show_progress=False)
    editor.edit(requests)
    data = editor.state.history.entries[-1].data()
    for layer in hparams.layers:  # what is below a layer is written before it: its keys stay what they were
        assert torch.equal(data[f"K_after.{layer}"], data[f"K.{layer}"])
        assert editor.state.layers[layer].state["n_rows"] == len(requests)


def test_verify_looks_at_what_a_rule_has(tok, requests, tmp_path, capsys):
    hparams = tiny_settings("llama", solver="memit", solver_settings={"n_0": 50})
    with RLSEditor(zoo.make("llama"), tok, hparams, state_dir=tmp_path, show_progress=False) as editor:
        editor.edit(requests)
    assert state_main(["verify", str(tmp_path)]) == 0
    assert "no batch solution to hold the state against" in " ".join(capsys.readouterr().out.split())


def test_it_is_compared_beside_others(site, tok, requests, demo_text, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    (tmp_path / "tiny.yaml").write_text(tiny_settings("llama", max_deviation="off").to_yaml())
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, requests)))
    given = ["solver=ridge,ridge--stiff", "settings.ridge--stiff.solver_settings.rho=100", "model.path=model"]
    given += ["model.hparams=tiny.yaml", "data.file=records.jsonl", "data.batch=2", "eval=quick"]
    given += ["threads=1", "out=out"]
    done = subprocess.run(
        [sys.executable, "-m", "easyedit_rls.cli.main", "compare", *given],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())["contenders"]
    assert found["ridge"]["settings"]["solver"] == "ridge"
    assert found["ridge--stiff"]["settings"]["solver_settings"] == {"rho": 100}
    assert found["ridge"]["deviation"] > found["ridge--stiff"]["deviation"] > 0
