"""Questions about what an edit says nothing of: which are asked, and what counts as unchanged."""

import json
import re
import subprocess
import sys

import pytest

from easyedit_rls import HyperParamsError, RequestError
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.data.records import read_records
from easyedit_rls.evaluation.relations import most_questions, other_questions, unchanged
from tests.conftest import REPOSITORY

RAW = json.loads(packaged_text("relations.json"))
KINDS = ("person", "place", "organization", "work", "other")


def record(tmp_path, *edits):
    """CounterFact records of (subject, relation); without a relation where it is None."""
    raw = [
        {
            "requested_rewrite": {"prompt": "{} is", "subject": subject, "target_new": {"str": "here"}}
            | ({} if relation is None else {"relation_id": relation})
        }
        for subject, relation in edits
    ]
    (tmp_path / "records.json").write_text(json.dumps(raw))
    return read_records(tmp_path / "records.json")


def templates(probes, subject):
    return {probe.prompt.replace(subject, "{}") for probe in probes}


def of_kind(kind, without=()):
    return {item["text"] for item in RAW["questions"][kind] if not set(item["relations"]) & set(without)}


def test_the_file_is_sound():
    assert tuple(RAW["questions"]) == KINDS
    listed = [relation for relations in RAW["kinds"].values() for relation in relations]
    assert len(listed) == len(set(listed))
    for items in RAW["questions"].values():
        texts = [item["text"] for item in items]
        assert len(texts) == len(set(texts)) >= 10
        assert all(text.count("{}") == 1 and text == text.strip() for text in texts)
        asked = [relation for item in items for relation in item["relations"]]
        assert all(re.fullmatch(r"P\d+", relation) for relation in [*asked, *listed])
    assert most_questions() >= 8


@pytest.mark.parametrize(
    ("relation", "kind"),
    [
        ("P19", "person"),
        ("P413", "person"),
        ("P36", "place"),
        ("P159", "organization"),
        ("P176", "work"),
        ("P361", "other"),
        ("P99999", "other"),
        ("capital", "other"),
        (None, "other"),
    ],
)
def test_the_kind_follows_from_the_relation_whose_own_questions_are_left_out(tmp_path, relation, kind):
    (edit,) = record(tmp_path, ("Ada", relation))
    assert edit.relation == relation
    left = of_kind(kind, {relation})
    (found,) = other_questions([edit], most_questions())
    assert len(found) == most_questions()
    assert templates(found, "Ada") <= left
    asked = set()
    for seed in range(40):
        asked |= templates(other_questions([edit], 8, seed)[0], "Ada")
    assert asked == left


def test_what_another_edit_of_the_subject_says_is_left_out_too(tmp_path):
    edits = record(tmp_path, ("Ada", "P19"), ("Ada", "P140"), ("Grace", "P19"))
    told = {"The religion of {} is"}
    for seed in range(40):
        first, second, third = other_questions(edits, most_questions(), seed)
        assert not told & (templates(first, "Ada") | templates(second, "Ada"))
        told_of_grace = told & templates(third, "Grace")
        if told_of_grace:
            break
    assert told_of_grace == told


def test_a_subject_with_many_edits_has_fewer_questions(tmp_path):
    relations = [relation for item in RAW["questions"]["person"] for relation in item["relations"]]
    edits = record(tmp_path, *(("Ada", relation) for relation in ["P19", *relations]))
    found = other_questions(edits, 5)
    assert templates(found[0], "Ada") == of_kind("person", relations)
    assert unchanged([[3, 4], []], [[3, 5], []]) == [0.5, None]


def test_the_choice_is_that_of_the_seed_in_any_process(tmp_path):
    edits = record(tmp_path, ("Ada", "P19"), ("Grace", "P19"), ("Oder", None))
    found = [[probe.prompt for probe in probes] for probes in other_questions(edits, 5)]
    program = (
        "from easyedit_rls.data.records import read_records\n"
        "from easyedit_rls.evaluation.relations import other_questions\n"
        "import json, sys\n"
        "asked = other_questions(read_records(sys.argv[1]), 5)\n"
        "print(json.dumps([[probe.prompt for probe in probes] for probes in asked]))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "records.json")]
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": str(REPOSITORY), "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == found
    assert [[probe.prompt for probe in probes] for probes in other_questions(edits, 5, 1)] != found
    assert templates(other_questions(edits, 5)[0], "Ada") != templates(other_questions(edits, 5)[1], "Grace")
    (alone,) = other_questions(edits[1:2], 5)
    assert [probe.prompt for probe in alone] == found[1]


def test_questions_have_their_requests_form(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Ada"}]
    chat = {"messages": turns, "subject": "Ada", "target_new": "Ann"}
    plain = {"prompt": "Ada is", "subject": "Ada", "target_new": "{}", "joint": ""}
    (tmp_path / "records.json").write_text(json.dumps([chat, plain]))
    ((first, *_), (second, *_)) = other_questions(read_records(tmp_path / "records.json"), 3)
    assert first.chat == (("system", "Be brief."),)
    assert (second.chat, second.joint) == (None, "")


def test_faults_name_the_cure(tmp_path):
    most = most_questions()
    with pytest.raises(HyperParamsError, match=f"n is {most + 1}; allowed: whole numbers from 0 to {most}"):
        other_questions(record(tmp_path, ("Ada", "P19")), most + 1)
    with pytest.raises(HyperParamsError, match="n is -1"):
        other_questions([], -1)
    with pytest.raises(RequestError, match=r"relation_id.* is a int, not text. Give a property of Wikidata"):
        record(tmp_path, ("Ada", 19))
    with pytest.raises(ValueError):
        unchanged([[1]], [[1, 2]])


def test_a_question_worded_as_the_edit_is_left_out(tmp_path):
    """Also where the record doesn't say its relation."""
    texts = [item["text"] for item in RAW["questions"]["other"]]
    raw = {
        "prompt": texts[0],
        "subject": "Oder",
        "target_new": "Spain",
        "rephrase_prompt": texts[1].format("Oder"),
    }
    (tmp_path / "records.json").write_text(json.dumps([raw]))
    (probes,) = other_questions(read_records(tmp_path / "records.json"), most_questions())
    assert not {probe.prompt for probe in probes} & {text.format("Oder") for text in texts[:2]}
