"""`easyedit-rls edit`, settings of another model, and the examples, run as a user runs them."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPOSITORY


def test_edit_saves_the_model_and_goes_on_from_a_ledger(tiny_folder, compared):
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
        ran = subprocess.run(
            [*base, "state_dir=ledger", *half], cwd=tiny_folder, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
    assert "ledger holds 2 edits" in ran.stdout
    ran = subprocess.run(
        [*base, "data.batch=2", "out=edited"], cwd=tiny_folder, capture_output=True, text=True
    )
    assert "4 edits, measured after the last" in ran.stdout
    written = json.loads((tiny_folder / "edited" / "edits.json").read_text())
    assert len(written["batches"]) == 2
    assert written["after"]["rewrite_accuracy"] > written["before"]["rewrite_accuracy"]
    once, twice = (load_file(tiny_folder / name / "model.safetensors") for name in ("edited", "edited2"))
    unedited = load_file(tiny_folder / "model" / "model.safetensors")
    changed = {name for name in unedited if not torch.equal(unedited[name], once[name])}
    assert changed == {"model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.weight"}
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_a_model_without_a_settings_file_is_edited(tiny_folder):
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
        [*base, *changes, "save=false", "out=made"], cwd=tiny_folder, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tiny_folder / "made" / "edits.json").read_text())["settings"]
    assert (found["model_name"], found["layers"], found["rewrite_module_tmp"]) == (
        "model",
        [1, 2],
        "model.layers.{}.mlp.down_proj",
    )


@pytest.mark.parametrize("command", ["edit", "compare", "tune"])
def test_settings_of_another_model_are_refused_with_each_difference(tiny_folder, command):
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
        [sys.executable, "-m", "easyedit_rls.cli.main", *given],
        cwd=tiny_folder,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "Traceback" not in ran.stderr
    assert all(text in ran.stderr for text in [*told, "does not suit model", "easyedit-rls init model"]), (
        ran.stderr
    )
    assert not list((tiny_folder / "other").glob("*"))  # hydra makes the folder


@pytest.mark.parametrize(
    ("example", "arguments", "lines"),
    [
        ("stream.py", [], ["4 edits: rewrite accuracy by batch"]),
        ("comparison.py", ["example"], ["RLSEdit: rewrite", "RLSEdit--soft: rewrite"]),
    ],
)
def test_examples(tiny_folder, example, arguments, lines):
    command = [
        sys.executable,
        str(REPOSITORY / "examples" / example),
        "model",
        "tiny.yaml",
        "records.jsonl",
        *arguments,
    ]
    ran = subprocess.run(command, cwd=tiny_folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert all(line in ran.stdout for line in lines)
    assert not arguments or (tiny_folder / arguments[0] / "report.html").is_file()
