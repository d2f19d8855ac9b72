"""The examples for EasyEdit run, on the real model; minutes long, since they sample the text behind the
anchors.
"""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize("example", ["easyedit_sequential.py", "easyedit_batch.py"])
def test_example(easyeditor, model_folder, smollm2, example):
    command = [sys.executable, str(REPOSITORY / "examples" / example), "smollm2-llama"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    done = subprocess.run(command, cwd=model_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [
        line
        for line in done.stdout.splitlines()
        if ("->" in line and " 0." in line) or line.startswith("batch ")
    ]
    assert len(lines) == 3
    assert all(line.endswith(("1.00", "1.00 after the last batch")) for line in lines), lines
