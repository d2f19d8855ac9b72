"""Two streams of thirty shipped facts through `batch_edit` on the real model, all scored again at the end by
EasyEdit itself.
"""

import importlib.resources
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

FACTS = importlib.resources.files("easyedit_rls.data") / "demo_facts.json"


@pytest.mark.slow
def test_thirty_edits_are_kept(easyeditor, model_folder, smollm2):
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks" / "easyedit_stream.py"),
        "--model",
        "smollm2-llama",
    ]
    command += ["--data", str(FACTS), "--first", "0", "--streams", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    done = subprocess.run(command, cwd=model_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(done.stdout)["means"]
    assert scores["rewrite_acc"] >= 0.97, scores
    assert scores["rephrase_acc"] >= 0.55, scores
    assert scores["locality"] >= 0.85, scores
