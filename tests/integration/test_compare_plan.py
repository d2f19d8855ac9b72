"""The plan of `easyedit-rls compare`: settings, texts, device and type; and what is said of a faulty one."""

import os
import shutil
import subprocess
from functools import partial

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module

from easyedit_rls import RLSEditHyperParams
from easyedit_rls.cli.compare import make_plan
from easyedit_rls.compare import stream
from easyedit_rls.editors.compared import RLSEdit
from tests.integration.conftest import COMPARE_ARGUMENTS, compare_command


def test_one_that_fails_is_told_of(tiny_folder, compared):
    changes = ["jobs=2", "out=failing", "settings.RLSEdit--short.max_deviation=1e-9"]
    ran = subprocess.run(
        compare_command(*changes), cwd=tiny_folder, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 1
    assert "RLSEdit--short ended with status 1" in ran.stderr
    assert not (tiny_folder / "failing" / "report.html").exists()


def test_what_one_cannot_use_is_told_in_a_line(tiny_folder, compared):
    changes = ["jobs=2", "out=refused", "settings.RLSEdit--short.layer_module_tmp='none.{}'"]
    ran = subprocess.run(
        compare_command(*changes), cwd=tiny_folder, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 2
    lines = [line for line in ran.stderr.splitlines() if line.startswith("easyedit-rls: ")]
    assert len(lines) == 1
    assert lines[0].startswith("easyedit-rls: RLSEdit--short: These settings do not fit LlamaForCausalLM")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("change", "n_texts"), [("templates=null", 1), ("templates=3", 3)])
def test_everybody_has_as_many_texts_before_prompts(tiny_folder, monkeypatch, change, n_texts):
    monkeypatch.chdir(tiny_folder)
    settings = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    (tiny_folder / "sampled.yaml").write_text(
        yaml.safe_dump({**settings, "context_templates": None, "n_templates": 1})
    )
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        config = compose(
            "compare", ["data.file=records.jsonl", "model.path=model", "model.hparams=sampled.yaml", change]
        )
    assert len(make_plan(config, tiny_folder).templates) == n_texts


def test_the_plan_says_where_it_runs(tiny_folder, monkeypatch):
    """It is itself made on the CPU."""
    monkeypatch.chdir(tiny_folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        given = [
            argument for argument in COMPARE_ARGUMENTS if not argument.startswith(("alg_name", "settings."))
        ]
        assert [
            make_plan(compose("compare", [*given, *more]), tiny_folder).device
            for more in ([], ["device=cuda:1"])
        ] == ["cuda", "cuda:1"]


def test_the_model_is_of_the_type_that_was_asked_for(tiny_folder, compared, monkeypatch, request, tmp_path):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.chdir(tiny_folder)
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        given = [
            argument for argument in COMPARE_ARGUMENTS if not argument.startswith(("alg_name", "settings."))
        ]
        plan = make_plan(compose("compare", [*given, "dtype=bfloat16", "data.count=2"]), tmp_path)
    plan.save(tmp_path)
    types = []
    edit = RLSEdit.edit
    monkeypatch.setattr(
        RLSEdit,
        "edit",
        lambda self, requests: types.append(self.model.dtype) or edit(self, requests),
    )
    stream.run_contender(tmp_path, plan, plan.contender("RLSEdit"))
    assert types == [torch.bfloat16]
    assert (tmp_path / "RLSEdit" / "checkpoint-000002.json").is_file()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["data.batch=3"], "holds results of another comparison; different: batch"),
        (["data.file=null", "out=x"], "Give a file of records: data.file=FILE"),
        (["data.file=none.json", "out=x"], "none.json can't be read"),
        (["alg_name=RLSEdit,RLSEdit", "out=x"], "name a contender twice"),
        (["settings.RLSEdit.v_rl=3", "out=x"], "RLSEdit: Unknown setting in the settings: 'v_rl'"),
        (["solver=rsl", "out=x"], "There is no solver 'rsl'. Did you mean rls?"),
        (["alg_name=RLSEdit--short,MEMIT", "out=x"], "MEMIT need EasyEdit"),
    ],
)
def test_faults_name_the_cure(tiny_folder, compared, changes, problem):
    environment = {**os.environ, "EASYEDIT_HOME": str(tiny_folder)}
    failed = subprocess.run(
        compare_command(*changes), cwd=tiny_folder, capture_output=True, text=True, env=environment
    )
    assert failed.returncode == (1 if "EasyEdit" in problem else 2)  # what is missing, and what is wrong
    assert problem in failed.stderr
    assert "Traceback" not in failed.stderr or "ended with status" in failed.stderr
    shutil.rmtree(tiny_folder / "x", ignore_errors=True)


def test_settings_are_made_from_the_model_where_none_are_given(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder)
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        config = compose("compare", ["data.file=records.jsonl", "model.path=model", "templates=1"])
    made = RLSEditHyperParams.from_dict(make_plan(config, tiny_folder).hparams)
    assert (made.model_name, made.layers, made.v_loss_layer) == ("model", [0, 1], 3)


def test_one_starts_from_a_file_of_its_own(tiny_folder, monkeypatch):
    monkeypatch.chdir(tiny_folder)
    settings = yaml.safe_load((tiny_folder / "tiny.yaml").read_text())
    own = {**settings, "mom2_update_weight": 77, "clamp_norm_factor": 2.5}
    (tiny_folder / "own.yaml").write_text(yaml.safe_dump(own))
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        given = [
            argument for argument in COMPARE_ARGUMENTS if not argument.startswith(("alg_name", "settings."))
        ]
        more = ["alg_name=[RLSEdit,RLSEdit--own]", "solver=[rls--own]", "++settings.RLSEdit--own.v_lr=0.125"]
        files = [f"++settings.{name}.hparams=own.yaml" for name in ("RLSEdit--own", "rls--own")]
        plan = make_plan(compose("compare", [*given, *more, *files]), tiny_folder)
    plain, edited, solved = (dict(contender.settings) for contender in plan.contenders)
    assert plain == {}
    assert edited == {"mom2_update_weight": 77, "clamp_norm_factor": 2.5, "v_lr": 0.125}
    assert solved == {"mom2_update_weight": 77, "clamp_norm_factor": 2.5}
