"""Some of the faults at single lines; `line_faults` strikes them all."""

import json
import subprocess
import sys

from tests.conftest import REPOSITORY


def test_a_change_is_everywhere_or_nowhere(tok, tmp_path):
    tok.save_pretrained(tmp_path / "tok")
    command = [
        sys.executable,
        "-m",
        "tests.integration.line_faults",
        "--tok",
        str(tmp_path / "tok"),
        "--stride",
        "151",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == []
    assert sum(tally["faults"] for tally in found["counts"].values()) > 250
    assert all(tally["nowhere"] for tally in found["counts"].values())
    assert found["counts"]["edit"]["everywhere"] > 0  # after the last moment
