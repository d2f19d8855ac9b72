"""What `easyedit-rls compare` measures and writes, run as a user runs it, on a tiny model."""

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

from easyedit_rls import RLSEditor
from easyedit_rls.compare import stream
from easyedit_rls.compare.objective import Objective
from easyedit_rls.compare.plan import Plan
from easyedit_rls.compare.progress import write_progress
from easyedit_rls.editors.compared import RLSEdit
from easyedit_rls.ledger.inspect import layer_figures
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_manifest, read_moment, read_prior
from tests.conftest import REPOSITORY, tiny_llama, tiny_settings
from tests.integration.conftest import COMPARE_ARGUMENTS, compare_command


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


def test_general_abilities_by_lm_eval(tiny_folder, tmp_path):
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
        argument
        for argument in compare_command()
        if not argument.startswith(("alg_name", "settings", "eval", "out"))
    ]
    subprocess.run([*arguments, *changes], cwd=tiny_folder, check=True, capture_output=True, text=True)
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["unedited"]["rivers: acc"] == 0.5  # whatever it prefers, half of the answers are that
    assert [("abilities" in checkpoint) for checkpoint in found["contenders"]["RLSEdit"]["checkpoints"]] == [
        False,
        True,
    ]
    assert "| rivers: acc |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "figures" / "ability-rivers.svg").is_file()


def test_everything_is_written(tiny_folder, compared):
    out = tiny_folder / "out"
    assert {
        "report.html",
        "results.json",
        "summary.json",
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
    short = json.loads((out / "summary.json").read_text())
    assert short["plan"]["data"] == "records.jsonl"
    assert short["unedited"] == result["unedited"]
    (_, last), (_, whole) = short["contenders"]["RLSEdit"]["checkpoints"], ours["checkpoints"]
    assert "records" not in last
    assert last["rewrite_accuracy"] == ours["rewrite_accuracy"]["mean"]
    assert last["n_records"] == len(whole["records"]) == 4
    fills = [max(checkpoint["fill"].values()) for checkpoint in ours["checkpoints"]]
    assert 0 < fills[0] < fills[1] == ours["fill"] < 1
    assert "fill" not in result["unedited"]
    assert "fullest layer, 0 to 1" in (out / "table.md").read_text()
    assert (out / "figures" / "fill.png").is_file()


def test_a_sample_is_measured_as_it_would_be_among_all(tiny_folder, compared, tmp_path):
    """First, last and middle record of four edits: the same figures, and everything else as well."""
    changes = [
        "alg_name=RLSEdit",
        "eval.sample=1",
        "eval.relations=1",
        "eval.every=2",
        f"out={tmp_path / 'out'}",
    ]
    arguments = [argument for argument in compare_command() if not argument.startswith(("alg_name", "out"))]
    arguments = [argument for argument in arguments if not argument.startswith(("settings", "eval.every"))]
    subprocess.run([*arguments, *changes], cwd=tiny_folder, check=True, capture_output=True, text=True)
    some = json.loads((tmp_path / "out" / "results.json").read_text())["contenders"]["RLSEdit"]
    whole = json.loads((tiny_folder / "out" / "results.json").read_text())["contenders"]["RLSEdit"]
    last, all_of_them = some["checkpoints"][-1], whole["checkpoints"][-1]
    assert (last["positions"], all_of_them["positions"]) == ([0, 2, 3], [0, 1, 2, 3])
    for position, record in zip(last["positions"], last["records"]):
        for name, value in all_of_them["records"][position].items():
            assert record[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert "other_relations" in last["records"][0]
    assert len(json.loads((tmp_path / "out" / "unedited.json").read_text())["quality"]) == 3


def test_a_line_a_batch(compared):
    for line in (
        "RLSEdit: batch 2 of 2",
        "RLSEdit--short: batch 1 of 2",
        '{"v_num_grad_steps": 2}',
        "rewrite accuracy",
    ):
        assert line in compared.stdout + compared.stderr


def test_two_at_once_give_the_same_table(tiny_folder, compared):
    """And the unedited model is measured by one of them, while the other waits."""
    ran = subprocess.run(
        compare_command("jobs=2", "out=at_once"), cwd=tiny_folder, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert without_times(tiny_folder / "at_once" / "results.json") == without_times(
        tiny_folder / "out" / "results.json"
    )
    assert (ran.stdout + ran.stderr).count("measures the unedited model") == 1


def test_the_whole_settings_are_shown(compared):
    shown = [line for line in (compared.stdout + compared.stderr).splitlines() if ": settings {" in line]
    assert [line.partition(":")[0].split()[-1] for line in shown] == ["RLSEdit", "RLSEdit--short"]
    assert json.loads(shown[1].partition("settings ")[2])["v_num_grad_steps"] == 2


def test_each_job_of_a_multirun_has_its_folder(tiny_folder):
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
        argument
        for argument in COMPARE_ARGUMENTS
        if not argument.startswith(("alg_name", "settings", "eval", "out"))
    ]
    program = [sys.executable, "-m", "easyedit_rls.cli.main", "compare", "--multirun"]
    done = subprocess.run([*program, *arguments, *changes], cwd=tiny_folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    firsts = [
        json.loads((tiny_folder / "many" / job / "plan.json").read_text())["first"] for job in ("0", "1")
    ]
    assert firsts == [0, 2]
    assert all((tiny_folder / "many" / job / "report.html").is_file() for job in ("0", "1"))


# Python runs it at its start: the whole run is killed as the second editor's first checkpoint is about to be
# written.
KILLER = """
import os, signal, sys

def watch(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("RLSEdit--short/checkpoint-000002.json"):
        os.killpg(0, signal.SIGKILL)

sys.addaudithook(watch)
"""


def test_a_broken_off_run_goes_on_to_the_same_table(tiny_folder, compared):
    """Killed behind the second editor's first batch: the first one's results are taken as they are, that
    batch isn't edited again.
    """
    out = tiny_folder / "killed"
    (tiny_folder / "killer").mkdir()
    (tiny_folder / "killer" / "sitecustomize.py").write_text(KILLER)
    broken_off = subprocess.run(
        compare_command("out=killed"),
        cwd=tiny_folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tiny_folder / "killer"), str(REPOSITORY)])},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        timeout=300,
    )
    assert broken_off.returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    first = (out / "RLSEdit" / "result.json").stat().st_mtime_ns
    again = subprocess.run(compare_command("out=killed"), cwd=tiny_folder, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert (out / "RLSEdit" / "result.json").stat().st_mtime_ns == first
    assert (out / "RLSEdit--short.log").read_text().count("done before") == 1
    assert not {"ledger", "progress.safetensors"} & {path.name for path in (out / "RLSEdit--short").iterdir()}
    assert without_times(out / "results.json") == without_times(tiny_folder / "out" / "results.json")


@pytest.mark.parametrize(("broken_off", "n_kept"), [("before it is noted", 0), ("before it is measured", 2)])
def test_a_batch_half_written_down(tiny_folder, compared, monkeypatch, request, broken_off, n_kept):
    """Killed between ledger and progress file, the contender begins anew; behind the second, it measures what
    isn't measured yet.
    """
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    monkeypatch.chdir(tiny_folder)
    plan = Plan.load(tiny_folder / "out")
    place = tiny_folder / broken_off
    plan.save(place)
    shutil.copy(tiny_folder / "out" / "unedited.json", place)

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
        for where in (place, tiny_folder / "out")
    )
    assert {**found, "seconds_per_edit": None} == {**wanted, "seconds_per_edit": None}
