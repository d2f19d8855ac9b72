"""Editors that are killed: what was reported is there, nothing is half there, and it goes on bit for bit."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork, and a new Python for each of hundreds of kills takes too long")
def test_killed_editors_lose_nothing_that_was_reported(tok, tmp_path):
    tok.save_pretrained(tmp_path / "tok")
    command = [sys.executable, "-m", "tests.integration.ledger_faults", str(tmp_path / "tok"), str(tmp_path), "220"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == []
    assert result["points"] > 100
    assert result["killed"]["injected"] == 2 * result["points"]  # each before the call and within it
    assert result["killed"]["random"] >= 200
    assert result["in_the_middle"] > 100
