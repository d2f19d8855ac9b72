"""`easyedit-rls compare` with every editor of the checkout, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_module
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import RLSEditHyperParams
from easyedit_rls.compare.versions import commit_of
from easyedit_rls.editors.base import EDITORS, Setup
from tests.host.test_parity import REQUESTS

NAMES = ("RLSEdit", "AlphaEdit", "MEMIT", "ROME", "FT", "ULTRAEDIT")
MORE = {"prompt": "The lake Garda", "subject": "lake Garda", "target_new": "stones"}


@pytest.fixture(scope="module")
def folder(easyeditor, model_folder, demo_text, tmp_path_factory):
    """Model, settings, text and records."""
    from tests.host.conftest import host_settings

    folder = tmp_path_factory.mktemp("compare")
    (folder / "text.txt").write_text(demo_text, encoding="utf-8")
    changes = {"model_name": "tiny-llama", "mom2_dataset": "text.txt", "v_num_grad_steps": 5}
    settings = {**host_settings(easyeditor, "tiny-llama").to_dict(), **changes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (folder / "tiny-llama").symlink_to(model_folder / "tiny-llama")
    (folder / "records.jsonl").write_text("\n".join(json.dumps(request) for request in [*REQUESTS, MORE]))
    return folder


def command(names, out):
    """Two batches of two edits."""
    arguments = [
        "model.path=tiny-llama",
        "model.hparams=tiny.yaml",
        "data.file=records.jsonl",
        "data.batch=2",
        "eval.every=1",
    ]
    arguments += [
        "settings.AlphaEdit.nullspace_threshold=1000",
        "eval.answers=false",
        f"alg_name={','.join(names)}",
        f"out={out}",
    ]
    return [sys.executable, "-m", "easyedit_rls.cli.main", "compare", *arguments]


@pytest.fixture(scope="module")
def compared(folder):
    """The folder of a finished comparison of all."""
    done = subprocess.run(command(NAMES, "out"), cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def test_each_editor_is_in_the_table(compared):
    result = json.loads((compared / "results.json").read_text())
    assert tuple(result["contenders"]) == NAMES
    for found in result["contenders"].values():
        assert [checkpoint["n_edits"] for checkpoint in found["checkpoints"]] == [2, 4]
        assert max(found["checkpoints"][-1]["deviation"].values()) > 0
        assert "P_loc" not in found["settings"]  # a temporary place
    versions = [found["versions"].get("easyedit", "none") for found in result["contenders"].values()]
    assert versions == ["none", *[commit_of(Path(os.environ["EASYEDIT_HOME"]))] * (len(NAMES) - 1)]
    table = (compared / "table.md").read_text()
    assert all(f"| {name} |" in table for name in NAMES)


def test_the_unedited_model_is_measured_once_for_all(compared):
    first, *others = [json.loads((compared / name / "checkpoint-000000.json").read_text()) for name in NAMES]
    assert first == json.loads((compared / "unedited.json").read_text())["figures"]
    assert not first["deviation"]
    assert all(other == first for other in others)
    logs = ["measures the unedited model" in (compared / f"{name}.log").read_text() for name in NAMES]
    assert logs == [True, *[False] * (len(NAMES) - 1)]


def test_alphaedit_goes_on_with_its_history(folder, compared):
    """Killed behind its first batch; in the second process its history must be that of the first."""
    child = subprocess.Popen(
        command(["AlphaEdit"], "killed"),
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while (
        not (folder / "killed" / "AlphaEdit" / "progress.safetensors").is_file()
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (folder / "killed" / "AlphaEdit" / "result.json").exists()
    again = subprocess.run(command(["AlphaEdit"], "killed"), cwd=folder, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "done before" in again.stdout + again.stderr
    last = [
        json.loads((folder / out / "AlphaEdit" / "checkpoint-000004.json").read_text())
        for out in ("out", "killed")
    ]
    assert last[0]["deviation"] == last[1]["deviation"]
    assert last[0]["records"] == last[1]["records"]


def test_they_are_measured_alike(compared):
    """One reference for the objective, one set of figures for all, those that only RLSEdit knows empty for
    the others.
    """
    last = {name: json.loads((compared / name / "checkpoint-000004.json").read_text()) for name in NAMES}
    assert len({frozenset(found["records"][0]) for found in last.values()}) == 1
    assert {name for name, found in last.items() if found["objective"]["edits"] is not None} == {"RLSEdit"}
    assert all(
        found["objective"]["deviation"] > 0 for name, found in last.items() if name not in ("ULTRAEDIT",)
    )


def test_the_tuned_settings_are_the_editors_own(easyeditor, model_folder, demo_text, tmp_path):
    """Each name in `alg=smollm2-135m` is one of that editor's settings, and reaches it."""
    from tests.host.conftest import host_settings

    with initialize_config_module("easyedit_rls.conf.streams", version_base="1.3"):
        tuned = compose("compare", ["alg=smollm2-135m"]).settings
    assert set(tuned) <= set(NAMES)
    (tmp_path / "text.txt").write_text(demo_text, encoding="utf-8")
    hparams = {
        **host_settings(easyeditor, "tiny-llama").to_dict(),
        "mom2_dataset": str(tmp_path / "text.txt"),
    }
    for name, changes in tuned.items():
        model = AutoModelForCausalLM.from_pretrained("tiny-llama")
        wanted = {
            key: value for key, value in changes.items() if key not in ("layers", "inner_params")
        }  # the tiny one has four layers
        setup = Setup(
            model,
            AutoTokenizer.from_pretrained("tiny-llama"),
            RLSEditHyperParams.from_dict(hparams),
            ("",),
            wanted,
            tmp_path,
        )
        EDITORS.get(name).check(wanted, setup.hparams)
        editor = EDITORS.get(name).begin(setup)
        assert wanted.items() <= editor.describe().items()
        editor.close()
