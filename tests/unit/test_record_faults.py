"""Faults of edit records and of their files: where they are, and what of a file is read in spite of them."""

import json

import pytest

from easyedit_rls import DataError, HyperParamsError, RequestError, RLSEditWarning
from easyedit_rls.data.records import read_file, read_records
from tests.unit.conftest import BIGEDIT, COUNTERFACT, FLAT, KNOWEDIT, LEAST, QAEDIT, UNKE, ZSRE, write


def test_part_of_a_file(tmp_path):
    path = write(tmp_path / "records.json", [FLAT, {**ZSRE, "alt": ""}, ZSRE, LEAST])
    with pytest.warns(
        RLSEditWarning, match=r"left out 1 of 4 records: 1 \(has no new answer\)"
    ):  # there is nothing to edit
        assert [record.request.case_id for record in read_records(path)] == [0, 2, 3]
    assert [record.request.case_id for record in read_file(path, first=1, count=1).records] == [2]
    with pytest.raises(DataError, match="no record behind number 4"):
        read_records(path, first=4)


@pytest.mark.parametrize(("record", "field", "problem"), [
    ({**FLAT, "target_new": None}, "target_new", "missing"),
    ({**COUNTERFACT, "requested_rewrite": "x"}, "requested_rewrite", "not a mapping"),
    ({**KNOWEDIT, "locality": {"Forgetfulness": [{"prompt": "x"}]}}, "locality.Forgetfulness",
        "not a list of"),
    ({**KNOWEDIT, "portability": ["x"]}, "portability", "not a mapping"),
    ({**KNOWEDIT, "portability": {"hop": {"prompt": ["a", "b"], "ground_truth": ["c"]}}}, "portability.hop",
        "1 answers for 2"),
    ({**ZSRE, "loc_ans": None}, "locality.neighborhood.ground_truth", "neither a text"),
    ({**COUNTERFACT, "generation_prompts": "x"}, "generation_prompts", "list of texts"),
    ("x", "", "is a str"),
])  # fmt: skip
def test_faults_name_file_record_and_field(tmp_path, record, field, problem):
    path = write(tmp_path / "records.json", [FLAT, record])
    with pytest.raises(RequestError, match=problem) as caught:
        read_records(path)
    assert caught.value.index == 1
    assert caught.value.field == field
    assert str(path) in str(caught.value)


_TWICE = "'prompt' stands twice in one mapping"


@pytest.mark.parametrize(("error", "name", "text", "problem"), [
    (DataError, "a.json", "{}", "holds a dict"),
    (DataError, "a.json", "[", "no JSON"),
    (RequestError, "a.jsonl", f"{json.dumps(LEAST)}\nx", r"Request 1: is no JSON: .*a.jsonl, line 2\)"),
    (DataError, "a.json", f"{json.dumps(LEAST)}\n" * 2, "One record a line .* name ends in '.jsonl'"),
    (DataError, "a.csv", 'prompt,subject\n"a', "line 1, is no CSV"),
    (RequestError, "a.csv", "prompt,subject\nx y,x,z", r"has 1 cells more .* \(in .*a.csv, line 2\)"),
    (DataError, "a.json", "[]", "has no record"),
    (DataError, "a.json", '[{"prompt": "a", "prompt": "b"}]', _TWICE),
    (RequestError, "a.jsonl", '{"prompt": "a", "prompt": "b"}', _TWICE),
    (DataError, "a.csv", "prompt,subject,prompt\na,b,c", "two columns of the name 'prompt'"),
    (DataError, "a.csv", "prompt;subject\na;b", "has ';' between its columns. Save it with commas"),
])  # fmt: skip
def test_faults_of_files(tmp_path, error, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match=problem):
        read_file(tmp_path / name)
    with pytest.raises(DataError, match="can't be read"):
        read_records(tmp_path / "none.json")


def test_all_records_are_checked_before_one_is_used(tmp_path):
    bad = [{**FLAT, "subject": "Eve"}, {**FLAT, "target_new": ""}, "x", {**FLAT, "prompt": 3}, *[{}] * 4]
    path = write(tmp_path / "r.jsonl", [FLAT, *bad, LEAST])
    with pytest.raises(
        RequestError,
        match=r"Request 1, field 'prompt': .*'Eve'.*r.jsonl, line 2\) 7 more are wrong: 2, 3, 4, 5, 6, …",
    ) as caught:
        read_file(path)
    assert "on_bad=skip" in str(caught.value)
    found = read_file(path, on_bad="skip")
    assert [record.index for record in found.records] == [0, 9]
    assert [one.index for one in found.left_out] == list(range(1, 9))
    assert found.left_out[1].reason == "line 3: field 'target_new' is empty. Give its text."
    with pytest.warns(RLSEditWarning, match=r"left out 8 of 10 records: 1 \(.*and 3 more"):
        read_records(path, on_bad="skip")
    assert [record.index for record in read_file(path, count=2, on_bad="skip").records] == [0, 9]
    with pytest.raises(DataError, match="no record that can be used: 8 of 8 records"):
        read_file(write(tmp_path / "bad.json", bad), on_bad="skip")


def test_fields_that_nobody_reads_are_named_once(tmp_path):
    path = write(
        tmp_path / "r.json",
        [{**LEAST, "rephrase_promt": "x", "note": 1}, {**LEAST, "note": 2}, COUNTERFACT, ZSRE, UNKE],
    )
    with pytest.warns(RLSEditWarning) as caught:
        read_records(path)
    assert len(caught) == 1
    assert str(caught[0].message).endswith(
        "fields that are not read: rephrase_promt (did you mean rephrase_prompt?), note."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [({"first": -1}, "first is -1"), ({"count": 0}, "count is 0"), ({"on_bad": "no"}, "'skip'")],
)
def test_arguments_out_of_range(tmp_path, change, message):
    with pytest.raises(HyperParamsError, match=message):
        read_file(write(tmp_path / "r.json", [LEAST]), **change)


@pytest.mark.parametrize(("record", "field", "problem"), [
    ({**ZSRE, "alt": None}, "alt", "missing"),
    ({**ZSRE, "rephrase": 3}, "rephrase", "neither a text"),
    ({**BIGEDIT, "ans": None}, "ans", "missing"),
    ({**UNKE, "question": ""}, "question", "empty"),
    ({**UNKE, "answer": 5}, "answer", "is a int"),
    ({**QAEDIT, "target": ""}, "target", "empty"),
    ({**QAEDIT, "id": 1.5}, "id", "is a float"),
    ({**FLAT, "locality": {"near": {"prompt": "a", "ground_truth": " "}}}, "locality.near.ground_truth",
        "empty"),
])  # fmt: skip
def test_faults_are_told_in_the_files_own_names(tmp_path, record, field, problem):
    with pytest.raises(RequestError, match=problem) as caught:
        read_records(write(tmp_path / "r.json", [record]))
    assert caught.value.field == field


def test_empty_cells(tmp_path):
    (tmp_path / "z.csv").write_text("subject,src,alt,importance\nAda,Who is Ada?,,\nAda,Who is Ada?,Eve,\n")
    found = read_file(tmp_path / "z.csv")
    assert ([record.request.target for record in found.records], found.left_out[0].reason) == (
        ["Eve"],
        "has no new answer",
    )
    (tmp_path / "h.csv").write_text("subject,question,object\nAda,Who is Ada?,\n")
    with pytest.raises(RequestError, match="field 'object': is empty"):
        read_file(tmp_path / "h.csv")
