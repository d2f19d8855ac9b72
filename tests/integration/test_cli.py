"""The commands, run as a user runs them, on a tiny model."""

import json
import os
import subprocess
import sys

import pytest
import yaml

import easyedit_rls
from easyedit_rls.cli import report
from easyedit_rls.cli.main import main
from tests.conftest import tiny_llama, tiny_settings


def run(*arguments, cwd):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-m", "easyedit_rls.cli.main", *arguments], cwd=cwd,
        capture_output=True, text=True, env=environment)  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory, tok):
    """The demo with its own facts and text, on a tiny random model."""
    folder = tmp_path_factory.mktemp("demo")
    tiny_llama().save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings("llama", v_num_grad_steps=3).to_dict()))
    done = run("demo", "model=model", "hparams=tiny.yaml", "out=out", "completions=2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_demo_writes_its_summary(demo):
    folder, _ = demo
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["n_edits"] == 64
    assert [len(row) for row in summary["retention"]] == [1, 2, 3, 4]
    for when in ("before", "after"):
        assert {"efficacy", "rewrite_accuracy", "generalization", "specificity", "perplexity"} <= summary[
            when
        ].keys()
    assert summary["seconds_per_edit"] > 0
    assert summary["settings"]["hparams"]["v_num_grad_steps"] == 3
    assert summary["versions"]["easyedit_rls"] == easyedit_rls.__version__
    assert len(summary["completions"]) == 2
    assert sum(len(batch["facts"]) for batch in summary["batches"]) == 64


def test_demo_shows_and_reports(demo):
    folder, done = demo
    for text in (
        "Efficacy",
        "Perplexity on plain text",
        "Seconds an edit",
        "after batch 4: rewrite accuracy",
    ):
        assert text in done.stdout
    assert "fact" in done.stderr  # the progress bars
    text = (folder / "out" / "report.md").read_text()
    assert "| Efficacy: P(new) > P(true) |" in text
    assert "![Retention of each batch](retention.png)" in text
    assert (folder / "out" / "retention.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        "report.md",
        "retention.png",
        "summary.json",
    ]


@pytest.mark.parametrize(("arguments", "message"), [
    (("model=nowhere",), "No model in .*nowhere.*demo-model out=nowhere"),
    (("hparams=nothing",), "No settings file at .*smollm2-135m"),
    (("facts=none.json",), "none.json can't be read: No such file"),
    (("batches=65",), "batches is 65; allowed: 1 to the number of facts, 64"),
])  # fmt: skip
def test_errors_are_one_line(tmp_path, arguments, message):
    done = run("demo", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    import re

    assert re.search(message, done.stderr)


@pytest.mark.parametrize("command", ["demo", "demo-model"])
def test_help_teaches(tmp_path, command):
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Reads" in done.stdout
    assert "name=value" in done.stdout


@pytest.mark.parametrize(("command", "line"), [
    ("demo", "batches: 4  # how many sequential batches the facts are cut into"),
    ("compare", "  every: 2  # batches between two checkpoints"),
    ("compare", "device: null  # cpu, cuda, cuda:1, ...; null takes a GPU where PyTorch sees one"),
    ("compare", "  relations: 0  # questions about each edited subject that no edit answers, at the end"),
    ("edit", "  first: 0  # how many to leave out at the beginning"),
])  # fmt: skip
def test_help_says_what_each_setting_is(tmp_path, command, line):
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout.splitlines()


def test_usage(capsys):
    assert main(["--help"]) == 0
    assert "demo-model" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["dmeo"]) == 2
    assert "no command 'dmeo'" in capsys.readouterr().err


def test_table_cells_keep_to_their_cell():
    assert report._cell("a|b\nc") == "a\\|b c"
