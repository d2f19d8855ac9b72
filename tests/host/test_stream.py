"""Streams of thirty real facts through `batch_edit` on the real model, all scored again at the end by
EasyEdit itself.

The first two of the ten streams of docs/tuning.md (*Every template's key for itself*), which had been named
before they were run.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

PARAREL = REPOSITORY.parent / "shared" / "data" / "pararel_dev.json"
SHORT_STREAM = [
    "mom2_n_samples=6000",
    "mom2_tolerance=0",
    "mom2_update_weight=150",
    "n_templates=5",
    "keys=each",
    "layers=[4,5,6,7,8,9,10]",
    "v_weight_decay=50",
    "early_stopping=off",
    "statement_share=0.5",
    'statements=["{}:","{} is","{},"]',
]


@pytest.mark.slow
def test_thirty_edits_are_kept(easyeditor, model_folder, smollm2, tmp_path):
    if not PARAREL.is_file():
        pytest.skip(f"no records at {PARAREL}")
    benchmarks, facts = REPOSITORY / "benchmarks", tmp_path / "facts.txt"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path])}
    data, streams = ["--data", str(PARAREL)], ["--first", "2900", "--streams", "2"]
    write_facts = [
        sys.executable,
        str(benchmarks / "facts_text.py"),
        *data,
        "--paraphrases",
        "--out",
        str(facts),
    ]
    subprocess.run(write_facts, env=environment, check=True)
    command = [
        sys.executable,
        str(benchmarks / "easyedit_stream.py"),
        "--model",
        "smollm2-llama",
        *data,
        *streams,
    ]
    command += [part for setting in [f"mom2_dataset={facts}", *SHORT_STREAM] for part in ("--set", setting)]
    done = subprocess.run(command, cwd=model_folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads(done.stdout)["means"]
    assert scores["rewrite_acc"] >= 0.97, scores
    assert scores["rephrase_acc"] >= 0.90, scores
    assert scores["locality"] >= 0.95, scores
