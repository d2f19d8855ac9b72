"""EasyEdit's own scripts run with RLSEdit, their files untouched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from easyedit_rls import HostError
from easyedit_rls.host.scripts import compile_with_ours
from tests.conftest import REPOSITORY
from tests.host.conftest import host_settings

ZSRE = [
    {
        "subject": subject,
        "src": f"Where does {subject} live?",
        "alt": target,
        "ans": target,
        "rephrase": f"In which place does {subject} live?",
        "loc": "nq question: who wrote the book",
        "loc_ans": "people",
        "portability": {"New Question": f"Who rules where {subject} lives?", "New Answer": "nobody"},
    }
    for subject, target in [
        ("Anna Maria Keller", "by the water"),
        ("Otto Braun", "in the north"),
        ("Rosa", "in a mill"),
    ]
]
NO_CHOICE = {
    "run_personality_editing.py"
}  # trains its own methods; it never chooses a class of settings by a name


@pytest.fixture
def examples(easyeditor) -> Path:
    return Path(easyeditor.__file__).parents[1] / "examples"


def test_every_script_that_takes_a_method_can_take_ours(examples):
    scripts = [
        path
        for path in sorted(examples.glob("*.py"))
        if "'--editing_method'" in path.read_text(encoding="utf-8")
    ]
    assert len(scripts) >= 15
    for path in scripts:
        if path.name in NO_CHOICE:
            with pytest.raises(HostError, match="offers no choice"):
                compile_with_ours(path)
        else:
            compile_with_ours(path)


@pytest.mark.parametrize(
    ("script", "data_file", "options", "result"),
    [
        (
            "run_zsre_llama2.py",
            "zsre_mend_eval_portability_gpt4.json",
            ["--metrics_save_dir", "OUT"],
            "RLSEdit_results.json",
        ),
        (
            "run_ultraedit_editing.py",
            "zsre_eval_20k.json",
            [
                "--data_type",
                "zsre",
                "--ds_size",
                "3",
                "--batch_size",
                "2",
                "--sequential_edit",
                "--output_dir",
                "OUT",
            ],
            "tiny-llama_RLSEdit_N=3_Sequential=True.json",
        ),
    ],
)
def test_unmodified_scripts_run_to_the_end(
    easyeditor, examples, model_folder, tmp_path, script, data_file, options, result
):
    (tmp_path / data_file).write_text(json.dumps(ZSRE))
    OmegaConf.save(host_settings(easyeditor, "tiny-llama").to_dict(), tmp_path / "hp.yaml")
    untouched = (examples / script).read_bytes()
    command = [
        sys.executable,
        "-m",
        "easyedit_rls.host",
        "run",
        f"examples/{script}",
        "--editing_method",
        "RLSEdit",
    ]
    command += ["--hparams_dir", str(tmp_path / "hp.yaml"), "--data_dir", str(tmp_path)]
    command += [str(tmp_path / "new" / "folder") if option == "OUT" else option for option in options]
    done = subprocess.run(
        command,
        cwd=model_folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    metrics = json.loads((tmp_path / "new" / "folder" / result).read_text())
    assert [metric["requested_rewrite"]["target_new"] for metric in metrics] == [
        record["alt"] for record in ZSRE
    ]
    assert all(0 <= metric["post"]["rewrite_acc"][0] <= 1 for metric in metrics)
    assert (examples / script).read_bytes() == untouched


def test_the_documented_two_lines_do_the_same(easyeditor, examples, model_folder, tmp_path):
    (tmp_path / "zsre_mend_eval_portability_gpt4.json").write_text(json.dumps(ZSRE[:1]))
    OmegaConf.save(host_settings(easyeditor, "tiny-llama").to_dict(), tmp_path / "hp.yaml")
    documented = (
        (REPOSITORY / "docs" / "easyedit.md")
        .read_text(encoding="utf-8")
        .split("settings' class.\n\n")[1]
        .splitlines()[:2]
    )
    source = (examples / "run_zsre_llama2.py").read_text(encoding="utf-8")
    changed = source.replace(
        "    else:\n        raise NotImplementedError",
        "\n".join([*documented, "    else:", "        raise NotImplementedError"]),
        1,
    )
    assert changed != source
    (tmp_path / "script.py").write_text(changed, encoding="utf-8")
    command = [
        sys.executable,
        str(tmp_path / "script.py"),
        "--editing_method",
        "RLSEdit",
        "--hparams_dir",
        str(tmp_path / "hp.yaml"),
    ]
    command += ["--data_dir", str(tmp_path), "--metrics_save_dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=model_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads((tmp_path / "RLSEdit_results.json").read_text())) == 1


def test_other_methods_still_run_their_own_branch(examples, tmp_path):
    command = [
        sys.executable,
        "-m",
        "easyedit_rls.host",
        "run",
        str(examples / "run_ultraedit_editing.py"),
        "--editing_method",
        "NoSuch",
    ]
    command += ["--hparams_dir", "x", "--data_dir", str(tmp_path), "--data_type", "zsre"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "NotImplementedError" in done.stderr  # the script's own answer
