"""Records that a model can't take are named before the first edit, or left out: `data.on_bad`."""

import json
import subprocess
import sys

import pytest
import yaml

from easyedit_rls.cli.main import main
from tests.conftest import tiny_settings
from tests.integration.test_wrong_inputs import _loggers_as_before, tree  # noqa: F401
from tests.integration.wrong_inputs import FACT, LONG, short_gpt2

GOOD = [FACT, {**FACT, "prompt": "Some say {} has", "subject": "rye", "target_new": "slow leaves"}]
BAD = {
    "long prompt": {**FACT, "prompt": LONG + "The river Oder"},
    "long rewording": {**FACT, "rephrase_prompt": LONG},
    "no target": {**FACT, "target_new": " "},
}
LONG_HOP = {
    **FACT,
    "prompt": "Anna {} says",
    "subject": "Keller",
    "portability": {"hop": {"prompt": [LONG], "ground_truth": ["x"]}},
}
SETTINGS = ["model.path=model", "model.hparams=tiny.yaml", "data.file=records.jsonl", "data.batch=1"]


@pytest.fixture
def folder(tmp_path, monkeypatch, tok):
    monkeypatch.chdir(tmp_path)
    short_gpt2().save_pretrained("model")
    tok.save_pretrained("model")
    settings = tiny_settings("gpt2", v_num_grad_steps=2, context_templates=[])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    facts = [GOOD[0], BAD["long prompt"], BAD["no target"], BAD["long rewording"], GOOD[1], LONG_HOP]
    (tmp_path / "records.jsonl").write_text("\n".join(json.dumps(fact) for fact in facts))
    return tmp_path


@pytest.mark.filterwarnings("default::easyedit_rls.errors.RLSEditWarning")
def test_edit_leaves_them_out_and_says_which(folder, capsys):
    assert main(["edit", *SETTINGS, "data.on_bad=skip", "out=out", "save=false"]) == 0
    lines = [
        line
        for line in capsys.readouterr().err.replace("\r", "\n").split("\n")
        if line.startswith("easyedit-rls: records")
    ]
    empty = "2 (line 3: field 'target_new' is empty. Give its text.)."
    assert lines[0] == f"easyedit-rls: records.jsonl: left out 1 of 6 records: {empty}"
    assert lines[1].startswith(
        "easyedit-rls: records.jsonl: left out 2 of 5 records: 1 (The prompt with its target"
    )
    assert "40 positions" in lines[1]
    found = json.loads((folder / "out" / "edits.json").read_text())
    assert len(found["batches"]) == 3


def test_edit_names_the_first_and_edits_none(folder, capsys):
    (folder / "records.jsonl").write_text(
        "\n".join(json.dumps(fact) for fact in [*GOOD, BAD["long prompt"], BAD["long rewording"]])
    )
    before = tree(folder)
    with pytest.raises(SystemExit) as ended:
        main(["edit", *SETTINGS, "state_dir=ledger", "out=out"])
    assert ended.value.code == 2
    line = capsys.readouterr().err.strip().split("\n")[-1]
    assert line.startswith("easyedit-rls: Request 2: The prompt with its target and the text before it has")
    assert "(in records.jsonl) 1 more is wrong: 3. Mend it, or leave such records out: on_bad=skip." in line
    assert tree(folder) == before


def test_a_comparison_has_the_same_records_for_all(folder):
    """Portability is measured here too."""
    command = [
        "compare",
        "alg_name=RLSEdit,RLSEdit--short",
        *SETTINGS,
        "data.on_bad=skip",
        "eval.fluency=0",
        "eval.answers=false",
        "out=out",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "easyedit_rls.cli.main", *command], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "left out 3 of 5 records: 1 (" in done.stderr
    plan = json.loads((folder / "out" / "plan.json").read_text())
    assert (plan["count"], plan["n_records"], plan["left_out"]) == (2, 5, [1, 3, 5])
    for name in ("RLSEdit", "RLSEdit--short"):
        assert len(json.loads((folder / "out" / name / "checkpoint-000002.json").read_text())["records"]) == 2
    (folder / "records.jsonl").write_text(json.dumps(FACT))
    again = subprocess.run(
        [sys.executable, "-m", "easyedit_rls.cli.main", *command], capture_output=True, text=True
    )
    assert again.returncode == 2
    assert "out holds results of another comparison; different: count" in again.stderr


@pytest.mark.filterwarnings("default::easyedit_rls.errors.RLSEditWarning")
@pytest.mark.parametrize("command", ["locate", "tune"])
def test_locate_and_tune_leave_them_out_too(folder, capsys, command):
    more = {"paraphrase_prompts": ["They say"], "neighborhood_prompts": ["The river Rhine"]}
    short_gpt2(n_positions=300).save_pretrained("model")  # perplexity has windows of 256
    too_long = {**FACT, "prompt": 3 * LONG + "The river Oder"}
    facts = [{**GOOD[0], **more}, too_long, {**GOOD[1], **more}]
    (folder / "records.jsonl").write_text("\n".join(json.dumps(fact) for fact in facts))
    arguments = [command, "model", "--data", "records.jsonl", "--out", "out"]
    if command == "tune":
        (folder / "text.txt").write_text(LONG)
        arguments += ["--hparams", "tiny.yaml", "--trials", "1", "--text", "text.txt"]
    assert main([*arguments, "--on-bad", "skip"]) == 0
    assert "easyedit-rls: records.jsonl: left out 1 of 3 records: 1 (" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "easyedit-rls: Request 1: The prompt with" in capsys.readouterr().err


@pytest.mark.filterwarnings("default::easyedit_rls.errors.RLSEditWarning")
def test_of_two_that_contradict_each_other_the_later_is_left_out(folder, capsys):
    facts = [GOOD[0], GOOD[1], {**GOOD[0], "target_new": "lakes"}]
    (folder / "records.jsonl").write_text("\n".join(json.dumps(fact) for fact in facts))
    alone = [*SETTINGS[:-1], "data.batch=2", "save=false"]
    assert main(["edit", *alone, "out=in-two-batches"]) == 0  # the later supersedes the earlier
    assert main(["edit", *SETTINGS[:-1], "data.batch=3", "data.on_bad=skip", "out=in-one", "save=false"]) == 0
    assert (
        "left out 1 of 3 records: 2 (gives 'The river Oder' the target 'lakes', but record 0"
        in capsys.readouterr().err
    )
