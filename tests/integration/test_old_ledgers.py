"""Ledgers of earlier versions, made by them from a tiny model: opened, gone on with, and compacted, or
refused with nothing touched.

Four edits in three batches, the first of them retracted, then a checkpoint.
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from easyedit_rls import LedgerError
from easyedit_rls.cli.main import main
from easyedit_rls.ledger.ledger import Ledger
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_moment
from easyedit_rls.ledger.state import EditorState
from easyedit_rls.model.weights import weights_fingerprint
from tests.tolerances import WEIGHTS

LEDGERS = Path(__file__).parents[1] / "data" / "ledgers"
READ = ["format-1-first", "format-1-forgetting", "format-1-last"]


def fingerprint(moment):
    return weights_fingerprint(
        {layer: solution.weight.float() for layer, solution in moment.solutions.items()}
    )


@pytest.mark.parametrize("name", READ)
def test_an_older_ledger_is_read_and_gone_on_with(name, tmp_path, capsys):
    folder = shutil.copytree(LEDGERS / name, tmp_path / "state")
    journal = latest(folder)
    moment = read_moment(journal)
    assert list(moment.history.live) == [2, 3, 4]
    assert fingerprint(moment) == moment.history.entries[-1].weights  # bit for bit
    again = read_moment(journal, from_start=True)
    for layer, solution in again.solutions.items():
        torch.testing.assert_close(solution.weight.float(), moment.solutions[layer].weight.float(), **WEIGHTS)

    ledger = Ledger(folder)
    state = EditorState(ledger, ledger.place())
    state.now = moment
    state.roll_back(None)
    assert list(state.history.live) == [2, 3]
    state.retract([2], torch.float32)
    state.checkpoint(1)
    ledger.close()
    assert list(read_moment(latest(folder)).history.live) == [3]
    for command in (["verify"], ["show"], ["log"], ["compact"], ["verify"], ["retract", "3"], ["verify"]):
        assert main(["state", command[0], str(folder), *command[1:]]) == 0, capsys.readouterr()
    assert json.loads((latest(folder).folder / "head.json").read_bytes())["format"] == 2
    assert json.loads((folder / "ledger.json").read_bytes())["format"] == 2
    assert not (folder / "set-aside").exists()


@pytest.mark.parametrize("command", ["show", "verify", "compact"])
def test_one_that_can_not_be_read_is_refused_as_it_is(command, tmp_path, capsys):
    folder = shutil.copytree(LEDGERS / "before-format-1", tmp_path / "state")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["state", command, str(folder)]) == 1
    assert "was written by version 0.1.0 of the package on 2026-" in capsys.readouterr().err
    assert {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "ledger.lock"
    } == before


def test_compaction_of_the_first_format_left_a_last_change_that_can_not_be_rolled_back(tmp_path):
    """Its checkpoint's last change may be another one than the last entry; so nobody goes back to it."""
    folder = shutil.copytree(LEDGERS / "format-1-last", tmp_path / "state")
    index = folder / "journal-0001" / "index.jsonl"
    lines = index.read_bytes().splitlines(keepends=True)
    lines[0] = (
        lines[0].replace(b'"next_id":1', b'"next_id":5').replace(b'"entry":{}', b'"entry":{"next_id":5}')
    )
    assert b'"next_id":5' in lines[0]
    content = b"".join(lines)
    index.write_bytes(content)
    head = {
        "lines": len(lines),
        "index_bytes": len(content),
        "index_sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "journal-0001" / "head.json").write_bytes(
        json.dumps(head, separators=(",", ":")).encode() + b"\n"
    )
    assert read_moment(latest(folder)).before is None
    assert read_moment(latest(LEDGERS / "format-1-last")).before is not None


def test_a_journal_that_is_lost_is_missed(tmp_path):
    folder = shutil.copytree(LEDGERS / "format-1-last", tmp_path / "state")
    assert main(["state", "compact", str(folder)]) == 0
    shutil.rmtree(latest(folder).folder)
    with pytest.raises(LedgerError, match=r"journal-0002 is missing, although ledger\.json says"):
        latest(folder)


def test_journals_are_counted_not_spelled(tmp_path):
    """As after ten thousand resets."""
    folder = shutil.copytree(LEDGERS / "format-1-last", tmp_path / "state")
    (folder / "journal-0001").rename(folder / "journal-9999")
    assert main(["state", "compact", str(folder)]) == 0
    assert latest(folder).folder.name == "journal-10000"
    (folder / "ledger.json").unlink()
    shutil.copytree(folder / "journal-10000", folder / "journal-9999")
    assert latest(folder).folder.name == "journal-10000"
