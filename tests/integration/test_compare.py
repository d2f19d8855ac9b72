"""`easyedit-rls compare`, run as a user runs it, on a tiny model."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from safetensors.torch import load_file

from easyedit_rls import RLSEditHyperParams, RLSEditor
from easyedit_rls.cli.compare import make_plan
from easyedit_rls.compare import stream
from easyedit_rls.compare.objective import Objective
from easyedit_rls.compare.plan import Plan
from easyedit_rls.compare.progress import write_progress
from easyedit_rls.editors.compared import RLSEdit
from easyedit_rls.ledger.inspect import layer_figures
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_manifest, read_moment, read_prior
from tests.conftest import REPOSITORY, tiny_llama, tiny_settings

ARGUMENTS = [
    "alg_name=RLSEdit,RLSEdit--short",
    "settings.RLSEdit--short.v_num_grad_steps=2",
    "model.path=model",
    "model.hparams=tiny.yaml",
    "data.file=records.jsonl",
    "data.batch=2",
    "eval.every=1",
    "eval.text=text.txt",
    "eval.fluency=2",
    "threads=1",
    "out=out",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tok, demo_text, requests):
    folder = tmp_path_factory.mktemp("compare")
    tiny_llama().save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings("llama").to_dict()))
    (folder / "text.txt").write_text(demo_text, encoding="utf-8")
    more = {
        "ground_truth": "stones",
        "rephrase_prompt": "It is",
        "locality_prompt": "The river Rhine",
        "locality_ground_truth": "flows",
    }
    records = [{**request, **more, "generation_prompts": ["The river"]} for request in requests]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def command(*changes):
    return [sys.executable, "-m", "easyedit_rls.cli.main", "compare", *ARGUMENTS, *changes]


@pytest.fixture(scope="module")
def done(folder):
    done = subprocess.run(command(), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def without_times(path):
    """Results but for what a clock says."""
    result = json.loads(path.read_text())
    for contender in result["contenders"].values():
        contender.pop("seconds_per_edit")
        for checkpoint in contender["checkpoints"]:
            checkpoint.pop("seconds_per_edit")
    return result


def test_the_objective_is_the_ledgers(tok, requests, tmp_path):
    """The same three terms as `easyedit-rls state show`,
    which reads them off the prior on disk, in float64.
    """
    model, hp = tiny_llama(), tiny_settings("llama", state_dir=str(tmp_path))
    objective = Objective(model, tok, hp)
    assert objective.terms(model, None) == {"edits": None, "deviation": 0.0, "anchors": 0.0}
    with RLSEditor(model, tok, hp) as editor:
        assert objective.terms(model, editor)["edits"] == 0.0
        editor.edit(requests[:2])
        editor.edit(requests[2:])
        found = objective.terms(model, editor)
    journal = latest(tmp_path)
    snapshot, manifest = read_moment(journal), read_manifest(journal)
    layers = [
        layer_figures(read_prior(journal, n), solution, snapshot.history, n, manifest)
        for n, solution in snapshot.solutions.items()
    ]
    assert found["edits"] == pytest.approx(sum(layer.edits_term for layer in layers), rel=1e-3)
    assert found["deviation"] == pytest.approx(sum(layer.deviation_term for layer in layers), rel=1e-3)
    assert found["anchors"] == pytest.approx(sum(layer.anchor_term for layer in layers), rel=1e-3)
    assert min(found.values()) > 0


def test_general_abilities_by_lm_eval(folder, tmp_path):
    """A task of one's own, with its documents beside it: the harness's own need a hub."""
    pytest.importorskip("lm_eval", reason="pip install 'easyedit-rls[lm-eval]'")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    documents = [{"question": "The river", "choices": ["Oder", "stones"], "answer": i % 2} for i in range(6)]
    (tasks / "rivers.jsonl").write_text("\n".join(map(json.dumps, documents)))
    task = {
        "task": "rivers",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rivers.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tasks / "rivers.yaml").write_text(yaml.safe_dump(task))
    changes = ["alg_name=RLSEdit", "eval=quick", "eval.every=1", "eval.text=null", "eval.fluency=0"]
    changes += [
        "eval.tasks=[rivers]",
        "eval.tasks_limit=4",
        f"eval.tasks_folder={tasks}",
        f"out={tmp_path / 'out'}",
    ]
    arguments = [
        argument for argument in command() if not argument.startswith(("alg_name", "settings", "eval", "out"))
    ]
    subprocess.run([*arguments, *changes], cwd=folder, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["unedited"]["rivers: acc"] == 0.5  # whatever it prefers, half of the answers are that
    assert [("abilities" in checkpoint) for checkpoint in found["contenders"]["RLSEdit"]["checkpoints"]] == [
        False,
        True,
    ]
    assert "| rivers: acc |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "figures" / "ability-rivers.svg").is_file()


def test_everything_is_written(folder, done):
    out = folder / "out"
    assert {
        "report.html",
        "results.json",
        "table.md",
        "table.csv",
        "figures",
        "plan.json",
        "RLSEdit.log",
    } <= {p.name for p in out.iterdir()}
    result = json.loads((out / "results.json").read_text())
    ours, short = (result["contenders"][name] for name in ("RLSEdit", "RLSEdit--short"))
    assert [checkpoint["n_edits"] for checkpoint in ours["checkpoints"]] == [2, 4]
    assert ours["rewrite_accuracy"]["mean"] > short["rewrite_accuracy"]["mean"]
    assert (ours["settings"]["v_num_grad_steps"], short["settings"]["v_num_grad_steps"]) == (20, 2)
    assert ours["settings"]["context_templates"] == short["settings"]["context_templates"]
    assert {"exact", "contained", "locality", "rewrite_acc", "perplexity", "fluency"} <= ours.keys()
    assert result["unedited"]["locality"]["mean"] == 1
    assert "answer" in ours["checkpoints"][-1]["records"][0]


def test_a_line_a_batch(done):
    for line in (
        "RLSEdit: batch 2 of 2",
        "RLSEdit--short: batch 1 of 2",
        '{"v_num_grad_steps": 2}',
        "rewrite accuracy",
    ):
        assert line in done.stdout + done.stderr


def test_two_at_once_give_the_same_table(folder, done):
    """And the unedited model is measured by one of them, while the other waits."""
    ran = subprocess.run(command("jobs=2", "out=at_once"), cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert without_times(folder / "at_once" / "results.json") == without_times(
        folder / "out" / "results.json"
    )
    assert (ran.stdout + ran.stderr).count("measures the unedited model") == 1


def test_one_that_fails_is_told_of(folder, done):
    changes = ["jobs=2", "out=failing", "settings.RLSEdit--short.max_deviation=1e-9"]
    ran = subprocess.run(command(*changes), cwd=folder, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    assert "RLSEdit--short ended with status 1" in ran.stderr
    assert not (folder / "failing" / "report.html").exists()


def test_what_one_cannot_use_is_told_in_a_line(folder, done):
    changes = ["jobs=2", "out=refused", "settings.RLSEdit--short.layer_module_tmp='none.{}'"]
    ran = subprocess.run(command(*changes), cwd=folder, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2
    lines = [line for line in ran.stderr.splitlines() if line.startswith("easyedit-rls: ")]
    assert len(lines) == 1
    assert lines[0].startswith("easyedit-rls: RLSEdit--short: These settings do not fit LlamaForCausalLM")
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(("change", "n_texts"), [("templates=null", 1), ("templates=3", 3)])
def test_everybody_has_as_many_texts_before_prompts(folder, monkeypatch, change, n_texts):
    monkeypatch.chdir(folder)
    settings = yaml.safe_load((folder / "tiny.yaml").read_text())
    (folder / "sampled.yaml").write_text(
        yaml.safe_dump({**settings, "context_templates": None, "n_templates": 1})
    )
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        config = compose(
            "compare", ["data.file=records.jsonl", "model.path=model", "model.hparams=sampled.yaml", change]
        )
    assert len(make_plan(config, folder).templates) == n_texts


def test_the_whole_settings_are_shown(done):
    shown = [line for line in (done.stdout + done.stderr).splitlines() if ": settings {" in line]
    assert [line.partition(":")[0].split()[-1] for line in shown] == ["RLSEdit", "RLSEdit--short"]
    assert json.loads(shown[1].partition("settings ")[2])["v_num_grad_steps"] == 2


def test_each_job_of_a_multirun_has_its_folder(folder):
    changes = [
        "alg_name=RLSEdit",
        "eval=quick",
        "eval.text=null",
        "eval.fluency=0",
        "data.count=2",
        "data.first=0,2",
        "out=many",
    ]
    arguments = [
        argument for argument in ARGUMENTS if not argument.startswith(("alg_name", "settings", "eval", "out"))
    ]
    program = [sys.executable, "-m", "easyedit_rls.cli.main", "compare", "--multirun"]
    done = subprocess.run([*program, *arguments, *changes], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    firsts = [json.loads((folder / "many" / job / "plan.json").read_text())["first"] for job in ("0", "1")]
    assert firsts == [0, 2]
    assert all((folder / "many" / job / "report.html").is_file() for job in ("0", "1"))


# Python runs it at its start: the whole run is killed as the second editor's first checkpoint is about to be
# written.
KILLER = """
import os, signal, sys

def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("RLSEdit--short/checkpoint-000002.json"):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(watch)
"""


def test_a_broken_off_run_goes_on_to_the_same_table(folder, done):
    """Killed behind the second editor's first batch: the first one's results are taken as they are, that
    batch isn't edited again.
    """
    out = folder / "killed"
    (folder / "killer").mkdir()
    (folder / "killer" / "sitecustomize.py").write_text(KILLER)
    broken_off = subprocess.run(
        command("out=killed"),
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder / "killer"), str(REPOSITORY)])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        timeout=300,
    )
    assert broken_off.returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    first = (out / "RLSEdit" / "result.json").stat().st_mtime_ns
    again = subprocess.run(command("out=killed"), cwd=folder, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (out / "RLSEdit" / "result.json").stat().st_mtime_ns == first
    assert (out / "RLSEdit--short.log").read_text().count("done before") == 1
    assert not {"ledger", "progress.safetensors"} & {path.name for path in (out / "RLSEdit--short").iterdir()}
    assert without_times(out / "results.json") == without_times(folder / "out" / "results.json")


@pytest.mark.parametrize(("broken_off", "n_kept"), [("before it is noted", 0), ("before it is measured", 2)])
def test_a_batch_half_written_down(folder, done, monkeypatch, request, broken_off, n_kept):
    """Killed between ledger and progress file, the contender begins anew; behind the second, it measures what
    isn't measured yet.
    """
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.chdir(folder)
    plan = Plan.load(folder / "out")
    place = folder / broken_off
    plan.save(place)
    shutil.copy(folder / "out" / "unedited.json", place)

    def noting(*args):
        if n_kept or len(args[-1]) < 2:
            write_progress(*args)
        if len(args[-1]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "write_progress", noting)
        stream.run_contender(place, plan, plan.contender("RLSEdit"))
    edited = []
    edit = RLSEdit.edit
    monkeypatch.setattr(
        RLSEdit, "edit", lambda self, requests: edited.append(requests) or edit(self, requests)
    )
    stream.run_contender(place, plan, plan.contender("RLSEdit"))
    assert len(edited) == 2 - n_kept
    found, wanted = (
        json.loads((where / "RLSEdit" / "checkpoint-000004.json").read_text())
        for where in (place, folder / "out")
    )
    assert {**found, "seconds_per_edit": None} == {**wanted, "seconds_per_edit": None}


def test_the_plan_says_where_it_runs(folder, monkeypatch):
    """It is itself made on the CPU."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        given = [argument for argument in ARGUMENTS if not argument.startswith(("alg_name", "settings."))]
        assert [
            make_plan(compose("compare", [*given, *more]), folder).device for more in ([], ["device=cuda:1"])
        ] == ["cuda", "cuda:1"]


def test_the_model_is_of_the_type_that_was_asked_for(folder, done, monkeypatch, request, tmp_path):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.chdir(folder)
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        given = [argument for argument in ARGUMENTS if not argument.startswith(("alg_name", "settings."))]
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
def test_faults_name_the_cure(folder, done, changes, problem):
    environment = {**os.environ, "EASYEDIT_HOME": str(folder)}
    failed = subprocess.run(command(*changes), cwd=folder, capture_output=True, text=True, env=environment)
    assert failed.returncode == (1 if "EasyEdit" in problem else 2)  # what is missing, and what is wrong
    assert problem in failed.stderr
    assert "Traceback" not in failed.stderr or "ended with status" in failed.stderr
    shutil.rmtree(folder / "x", ignore_errors=True)


def test_edit_saves_the_model_and_goes_on_from_a_ledger(folder, done):
    """The second call starts from the unedited folder and the ledger of the first."""
    base = [
        sys.executable,
        "-m",
        "easyedit_rls.cli.main",
        "edit",
        "model.path=model",
        "model.hparams=tiny.yaml",
        "data.file=records.jsonl",
    ]
    halves = [["data.count=2", "out=edited1"], ["data.first=2", "out=edited2"]]
    for half in halves:
        ran = subprocess.run([*base, "state_dir=ledger", *half], cwd=folder, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
    assert "ledger holds 2 edits" in ran.stdout
    ran = subprocess.run([*base, "data.batch=2", "out=edited"], cwd=folder, capture_output=True, text=True)
    assert "4 edits, measured after the last" in ran.stdout
    written = json.loads((folder / "edited" / "edits.json").read_text())
    assert len(written["batches"]) == 2
    assert written["after"]["rewrite_accuracy"] > written["before"]["rewrite_accuracy"]
    once, twice = (load_file(folder / name / "model.safetensors") for name in ("edited", "edited2"))
    unedited = load_file(folder / "model" / "model.safetensors")
    changed = {name for name in unedited if not torch.equal(unedited[name], once[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_model_without_a_settings_file_is_edited(folder):
    settings = {
        "layers": "[1,2]",
        "mom2_adjustment": "false",
        "lambda_reg": 1.0,
        "v_num_grad_steps": 3,
        "context_templates": "[]",
    }
    changes = [f"settings.{name}={value}" for name, value in settings.items()]
    base = [
        sys.executable,
        "-m",
        "easyedit_rls.cli.main",
        "edit",
        "model.path=model",
        "data.file=records.jsonl",
    ]
    ran = subprocess.run(
        [*base, *changes, "save=false", "out=made"], cwd=folder, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((folder / "made" / "edits.json").read_text())["settings"]
    assert (found["model_name"], found["layers"], found["rewrite_module_tmp"]) == (
        "model",
        [1, 2],
        "model.layers.{}.mlp.down_proj",
    )


@pytest.mark.parametrize("command", ["edit", "compare", "tune"])
def test_settings_of_another_model_are_refused_with_each_difference(folder, command):
    given = {
        "edit": ["edit", "model=smollm2-135m", "model.path=model", "data.file=records.jsonl", "out=other"],
        "compare": [
            "compare",
            "model.path=model",
            "model.hparams=gpt2-xl",
            "data.file=records.jsonl",
            "out=other",
        ],
        "tune": ["tune", "model", "--data", "records.jsonl", "--hparams", "gpt2-xl", "--out", "other"],
    }[command]
    told = {
        "smollm2-135m": [
            "no layer 4, 5, 6, 7, 8, 9, 10: its 4 layers are 0 to 3",
            "v_loss_layer: 29, but the last of its 4 layers is 3",
        ],
        "gpt2-xl": [
            "layer_module_tmp: no module 'transformer.h.0'",
            "ln_f_module: no module 'transformer.ln_f'",
        ],
    }["smollm2-135m" if command == "edit" else "gpt2-xl"]
    ran = subprocess.run(
        [sys.executable, "-m", "easyedit_rls.cli.main", *given], cwd=folder, capture_output=True, text=True
    )
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert all(text in ran.stderr for text in [*told, "does not suit model", "easyedit-rls init model"]), (
        ran.stderr
    )
    assert not list((folder / "other").glob("*"))  # hydra makes the folder


def test_settings_are_made_from_the_model_where_none_are_given(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with initialize_config_module("easyedit_rls.conf.streams", version_base=None):
        config = compose("compare", ["data.file=records.jsonl", "model.path=model", "templates=1"])
    made = RLSEditHyperParams.from_dict(make_plan(config, folder).hparams)
    assert (made.model_name, made.layers, made.v_loss_layer) == ("model", [0, 1], 3)


@pytest.mark.parametrize(
    ("example", "arguments", "lines"),
    [
        ("stream.py", [], ["4 edits: rewrite accuracy by batch"]),
        ("comparison.py", ["example"], ["RLSEdit: rewrite", "RLSEdit--soft: rewrite"]),
    ],
)
def test_examples(folder, example, arguments, lines):
    command = [
        sys.executable,
        str(REPOSITORY / "examples" / example),
        "model",
        "tiny.yaml",
        "records.jsonl",
        *arguments,
    ]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert all(line in ran.stdout for line in lines)
    assert not arguments or (folder / arguments[0] / "report.html").is_file()
