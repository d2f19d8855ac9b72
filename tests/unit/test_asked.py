"""Every prompt of a record gets what an editor puts in front of it, and nothing else of it changes."""

import json
from dataclasses import replace

import pytest

from easyedit_rls.compare.asked import asked, asked_probe
from easyedit_rls.data.records import read_records

PAIR = {"prompt": ["Ada works", "Cats eat"], "ground_truth": ["there", "mice"]}
FLAT = {"prompt": "{} was born in", "subject": "Ada", "target_new": "Rome", "ground_truth": "Bonn",
    "paraphrase_prompts": ["Long ago. Ada came from", "There she"], "generation_prompts": ["Ada likes"],
    "locality": {"near": PAIR}, "portability": {"hop": PAIR}}  # fmt: skip


def in_front(prompt):
    return "Ada: Rome\n" if "Ada" in prompt else ""


@pytest.fixture
def record(tmp_path):
    (tmp_path / "records.json").write_text(json.dumps([FLAT]))
    return read_records(tmp_path / "records.json")[0]


def test_each_prompt_has_its_text_in_front(record):
    found = asked(record, in_front)
    assert found.request.prompt == "Ada: Rome\nAda was born in"
    assert found.request.paraphrases == ("Ada: Rome\nLong ago. Ada came from", "There she")
    assert [probe.prompt for probe in found.request.neighbors] == ["Ada: Rome\nAda works", "Cats eat"]
    assert found.generation_prompts == ("Ada: Rome\nAda likes",)
    assert found.easyedit["prompt"] == found.request.prompt
    assert found.easyedit["rephrase_prompt"] == found.request.paraphrases[0]
    for section, name in (("locality", "near"), ("portability", "hop")):
        assert found.easyedit[section][name] == {**PAIR, "prompt": ["Ada: Rome\nAda works", "Cats eat"]}
    assert record.request.prompt == "Ada was born in"  # it is not written into


def test_nothing_else_changes(record):
    assert asked(record, lambda prompt: "") == record
    found = asked(record, in_front)
    texts = ("prompt", "rephrase_prompt", "locality", "portability")
    assert {k: v for k, v in found.easyedit.items() if k not in texts} == {
        k: v for k, v in record.easyedit.items() if k not in texts
    }
    back = replace(found.request, before="", paraphrases=record.request.paraphrases,
        neighbors=record.request.neighbors)  # fmt: skip
    assert back == record.request
    assert (found.index, found.relation) == (record.index, record.relation)


def test_of_a_chat_it_is_the_users_turn(tmp_path):
    turns = [{"role": "system", "content": "Ada is here."}, {"role": "user", "content": "Who is Ada?"}]
    (tmp_path / "records.json").write_text(
        json.dumps([{"messages": turns, "subject": "Ada", "target_new": "Ann", "rephrase_prompt": None}])
    )
    found = asked(read_records(tmp_path / "records.json")[0], in_front)
    assert found.request.prompt == "Ada: Rome\nWho is Ada?"
    assert found.request.chat == (("system", "Ada is here."),)
    assert found.easyedit["messages"] == [turns[0], {"role": "user", "content": "Ada: Rome\nWho is Ada?"}]
    assert "prompt" not in found.easyedit
    probe = found.request.probe("Of Ada", "Ann")
    assert asked_probe(probe, in_front) == replace(probe, prompt="Ada: Rome\nOf Ada")
