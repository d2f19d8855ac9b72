"""The examples run, on the real model; minutes long, since they sample the text behind the anchors."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, SMOLLM2


@pytest.mark.slow
def test_quickstart(smollm2):
    done = subprocess.run([sys.executable, "examples/quickstart.py", str(SMOLLM2)], cwd=REPOSITORY,
        capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, after, *_, undone = done.stdout.splitlines()
    assert "'efficacy': 1.0" in after
    assert before.removeprefix("before ") == undone.removeprefix("undone ")
    assert before.removeprefix("before ") != after.removeprefix("after  ")


@pytest.mark.slow
def test_ledger(smollm2, tmp_path):
    command = [sys.executable, "examples/ledger.py", str(SMOLLM2), str(tmp_path / "edits")]
    for found in (0, 1):  # the second run finds what the first one left: one edit was taken back
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert lines[0] == f"found  {found} edits"
        assert lines[1].startswith("edited 1.0 as numbers")
        assert lines[2] == "again  1.0"
        assert lines[3] == "left   [1.0, 0.0]"
