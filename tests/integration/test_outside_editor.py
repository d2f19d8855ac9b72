"""An editor from another package: found by its entry point, compared like any other, in a process of its own.

It leaves the weights alone and puts a module around an MLP, so that names of parameters change.
"""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open

from easyedit_rls.compare import stream
from easyedit_rls.compare.plan import Plan
from easyedit_rls.compare.progress import write_progress
from easyedit_rls.editors.base import EDITORS
from tests.conftest import REPOSITORY, tiny_llama, tiny_settings

EDITOR = """
import torch
from easyedit_rls.editors.base import Editor, register_editor

class Shifted(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.shift = inner, torch.nn.Parameter(torch.zeros(inner.down_proj.out_features))

    def forward(self, x):
        return self.inner(x) + self.shift

@register_editor("Shift")
class Shift(Editor):
    def __init__(self, setup):
        self.model, self.layer = setup.model, setup.hparams.layers[-1]
        self.size = setup.settings.get("size", 1.0)
        block = self.model.model.layers[self.layer]
        block.mlp = Shifted(block.mlp)

    @classmethod
    def begin(cls, setup):
        return cls(setup)

    @torch.no_grad()
    def edit(self, requests):
        self.model.model.layers[self.layer].mlp.shift += self.size * len(requests)

    def describe(self):
        return {"size": self.size}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok, requests, demo_text):
    """Model, settings and records; and in `site` the editor as an installed package."""
    folder = tmp_path_factory.mktemp("outside")
    tiny_llama().save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    (folder / "tiny.yaml").write_text(tiny_settings("llama").to_yaml())
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, requests)))
    (folder / "text.txt").write_text(demo_text[:3000], encoding="utf-8")
    (folder / "site" / "shift-1.0.dist-info").mkdir(parents=True)
    (folder / "site" / "shift_editor.py").write_text(EDITOR)
    meta = {
        "METADATA": "Metadata-Version: 2.1\nName: shift\nVersion: 1.0\n",
        "entry_points.txt": "[easyedit_rls.editors]\nShift = shift_editor\n",
    }
    for name, content in meta.items():
        (folder / "site" / "shift-1.0.dist-info" / name).write_text(content)
    return folder


def compare(folder, *changes):
    given = ["model.path=model", "model.hparams=tiny.yaml", "data.file=records.jsonl", "data.batch=2"]
    given += ["eval=quick", "eval.every=1", "eval.text=text.txt", "threads=1", "out=out", *changes]
    path = os.pathsep.join([str(folder / "site"), str(REPOSITORY)])
    return subprocess.run(
        [sys.executable, "-m", "easyedit_rls.cli.main", "compare", *given],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def done(folder):
    """It beside RLSEdit, and rules that RLSEdit runs."""
    names = ["alg_name=RLSEdit,Shift,Shift--far", "solver=rls,rls--short"]
    done = compare(folder, *names, "settings.Shift--far.size=9", "settings.rls--short.v_num_grad_steps=2")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "out" / "results.json").read_text())


def test_it_is_compared_by_name(done):
    assert list(done["contenders"]) == ["RLSEdit", "Shift", "Shift--far", "rls", "rls--short"]
    assert [done["contenders"][name]["settings"] for name in ("Shift", "Shift--far")] == [
        {"size": 1.0},
        {"size": 9},
    ]


def test_it_is_measured_through_what_it_put_around_the_model(done):
    first, last = done["contenders"]["Shift"]["checkpoints"]
    assert first["deviation"] == last["deviation"] == {}  # the weights that still have their names
    assert set(last["objective"].values()) == {None}  # an edited one is none of them
    far = done["contenders"]["Shift--far"]["checkpoints"][-1]
    found = [point["perplexity"] for point in (done["unedited"], first, last, far)]
    assert len(set(found)) == 4
    assert done["contenders"]["Shift"]["deviation"] == 0
    assert max(done["contenders"]["RLSEdit"]["checkpoints"][-1]["deviation"].values()) > 0


def test_a_solver_by_name_is_rlsedit_with_it(done):
    ours, rule, short = (done["contenders"][name] for name in ("RLSEdit", "rls", "rls--short"))
    assert ours["checkpoints"][-1]["records"] == rule["checkpoints"][-1]["records"]
    assert ours["checkpoints"][-1]["records"] != short["checkpoints"][-1]["records"]
    assert (short["settings"]["solver"], short["settings"]["v_num_grad_steps"]) == ("rls", 2)


def test_versions_are_told(done):
    found = done["contenders"]["Shift"]["versions"]
    assert found.keys() == {"easyedit_rls", "torch", "transformers", "python"}  # EasyEdit did not run
    assert all(found.values())


def test_it_begins_anew_where_it_was_stopped(folder, done, monkeypatch, request, tmp_path):
    """It does not say that it remembers."""
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.setattr(EDITORS, "_classes", dict(EDITORS._classes))
    monkeypatch.syspath_prepend(folder / "site")
    monkeypatch.chdir(folder)
    plan = Plan.load(folder / "out")
    noted = []

    def stopping(*args):
        write_progress(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "write_progress", stopping)
        stream.run_contender(tmp_path, plan, plan.contender("Shift"))
    with safe_open(tmp_path / "Shift" / "progress.safetensors", framework="pt") as file:
        assert not list(file.keys())  # no weight that the unedited model has
    monkeypatch.setattr(
        stream, "write_progress", lambda *args: noted.append(len(args[-1])) or write_progress(*args)
    )
    stream.run_contender(tmp_path, plan, plan.contender("Shift"))
    assert noted == [1, 2]
    last = [
        json.loads((place / "Shift" / "checkpoint-000004.json").read_text())
        for place in (tmp_path, folder / "out")
    ]
    assert last[0]["records"] == last[1]["records"]


def test_a_module_without_the_editor_is_told_of(folder, tmp_path):
    (tmp_path / "site" / "other-1.0.dist-info").mkdir(parents=True)
    entry = "[easyedit_rls.editors]\nOther = json\nGone = no_such_module\n"
    (tmp_path / "site" / "other-1.0.dist-info" / "entry_points.txt").write_text(entry)
    (tmp_path / "site" / "other-1.0.dist-info" / "METADATA").write_text("Name: other\nVersion: 1.0\n")
    failed = compare(tmp_path, "alg_name=Other")
    assert failed.returncode == 2
    assert "Put @register_editor('Other') on its class" in failed.stderr
    failed = compare(tmp_path, "alg_name=Gone")
    assert failed.returncode == 2
    assert "no_such_module" in failed.stderr
    assert "Traceback" not in failed.stderr
