"""Editors that are killed: what was reported is there, nothing is half there, and it goes on bit for bit."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

LIMIT_S = 1800.0  # it takes two or three minutes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_killed_editors_lose_nothing_that_was_reported(tok, tmp_path):
    tok.save_pretrained(tmp_path / "tok")
    children = []
    for shard in range(2):
        (tmp_path / str(shard)).mkdir()
        command = [
            sys.executable,
            "-m",
            "tests.integration.ledger_faults",
            str(tmp_path / "tok"),
            str(tmp_path / str(shard)),
            "100",
            str(shard),
            "2",
        ]
        children.append(
            subprocess.Popen(
                command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    results = []
    try:
        for child in children:
            out, err = child.communicate(timeout=LIMIT_S)
            assert child.returncode == 0, err
            results.append(json.loads(out))
    finally:
        for child in children:
            child.kill()
    assert [problem for result in results for problem in result["problems"]] == []
    points = results[0]["points"]
    assert points > 100
    assert (
        sum(result["killed"]["injected"] for result in results) == 2 * points
    )  # each before the call and within it
    assert sum(result["killed"]["random"] for result in results) >= 200
    assert sum(result["in_the_middle"] for result in results) > 200
