"""`benchmarks/facts_text.py`: which statements the anchors' moments may be taken from."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def record(subject, neighbor):
    return {"requested_rewrite": {"prompt": "{} lies in", "subject": subject, "target_true": {"str": "Asia"},
        "target_new": {"str": "Europe"}}, "paraphrase_prompts": [f"{subject} is part of"],
        "neighborhood_prompts": [f"{neighbor} lies in"]}  # fmt: skip


@pytest.fixture
def written(tmp_path):
    records = [record("Goa", "Laos"), record("Bali", "Goa"), record("Oman", "Iran"), record("Bali", "Bali")]
    (tmp_path / "records.json").write_text(json.dumps(records))

    def write(*options):
        out = tmp_path / "facts.txt"
        command = [sys.executable, REPOSITORY / "benchmarks" / "facts_text.py", "--data",
            tmp_path / "records.json", "--out", out, *options]  # fmt: skip
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        return out.read_text().split("\n\n")

    return write


def test_statements_are_those_of_the_records_asked_for_each_once(written):
    assert written("--first", "1", "--count", "3") == ["Bali lies in Asia.", "Oman lies in Asia."]
    assert written("--first", "1", "--count", "1", "--paraphrases") == [
        "Bali lies in Asia.",
        "Bali is part of Asia.",
    ]


def test_what_is_measured_is_left_out(written):
    """A neighbor of a record that is read may be what another record asks or edits."""
    assert written("--first", "1", "--count", "2", "--neighbors") == [
        *("Bali lies in Asia.", "Goa lies in Asia.", "Oman lies in Asia.", "Iran lies in Asia.")
    ]
    left = written(
        "--first", "1", "--count", "2", "--neighbors", "--measured", "0", "1", "--measured", "3", "1"
    )
    assert left == ["Oman lies in Asia.", "Iran lies in Asia."]
