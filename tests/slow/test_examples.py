"""The examples run, on the real model; minutes long, since they sample the text behind the anchors."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, SMOLLM2


@pytest.mark.slow
def test_quickstart(smollm2):
    done = subprocess.run([sys.executable, "examples/quickstart.py", str(SMOLLM2)], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after, *_, undone = done.stdout.splitlines()
    assert "'efficacy': 1.0" in after
    assert before.removeprefix("before ") == undone.removeprefix("undone ")
    assert before.removeprefix("before ") != after.removeprefix("after  ")
