"""What stands between prompt and answer: as the text tells, as the request says, the same in editing and in
every metric.
"""

import json

import pytest

from easyedit_rls.data.joints import joint
from easyedit_rls.data.records import read_records
from easyedit_rls.data.requests import EditRequest, Probe, parse_requests
from easyedit_rls.errors import RequestError
from easyedit_rls.evaluation import edit_quality, evaluate
from easyedit_rls.facts.keys import locate_facts
from easyedit_rls.model.subject import answer_rows
from tests.conftest import tiny_llama

FACT = {"prompt": "The bread is made of", "subject": "bread", "target_new": "leaves", "ground_truth": "flour",
    "rephrase_prompt": "Bakers make bread from",
    "locality": {"n": {"prompt": "Cake is made of", "ground_truth": "flour"}}}  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Привет, меня зовут", " "),
        ("اسمي", " "),
        ("मेरा नाम है", " "),  # ends in a vowel sign
        ("그의 이름은", " "),
        ("100%", " "),
        ("What is it?", " "),
        ("《西游记》的作者是「", ""),
        ("ผู้แต่งคือ", ""),
        ("စာရေးသူမှာ", ""),
        ("答えは（", ""),
        ("他的手机是iPhone", " "),
        ("😀", ""),
        ("x +", ""),
        ("'tis said 'so'", " "),
        ("«", ""),
        ("»", " "),
        ("tab\t", ""),
    ],
)
def test_the_text_tells(prompt, expected):
    assert joint(prompt, "x") == expected


@pytest.mark.parametrize(("given", "between"), [({}, " "), ({"joint": ""}, ""), ({"joint": "\n"}, "\n")])
def test_a_joint_is_the_same_in_editing_and_in_every_metric(tok, given, between):
    (request,) = parse_requests({**FACT, **given})
    (fact,) = locate_facts(tok, [request], ["It is so. "])
    assert [tok.decode(row.ids) for row in fact.rows] == [
        f"{text}The bread is made of{between}leaves" for text in ("", "It is so. ")
    ]
    seen = []

    class Spy:
        """A tokenizer that keeps what it is asked for."""

        def __getattr__(self, name):
            return getattr(tok, name)

        def __call__(self, texts, **kwargs):
            seen.extend([texts] if isinstance(texts, str) else texts)
            return tok(texts, **kwargs)

    model, spy = tiny_llama(), Spy()
    evaluate(model, spy, request)
    edit_quality(model, spy, [{**FACT, **given}])
    wholes = {text for text in seen if text.endswith(("leaves", "flour"))}
    prompts = ("The bread is made of", "Bakers make bread from", "Cake is made of")
    assert wholes == {f"{prompt}{between}{answer}" for prompt in prompts for answer in ("leaves", "flour")}


def test_texts_are_taken_as_they_are(tok):
    (request,) = parse_requests(
        {"prompt": "def {}(w, h):\n", "subject": "area", "target_new": "    return w * h\n"}
    )
    assert (request.prompt, request.target) == ("def area(w, h):\n", "    return w * h\n")
    (row,) = answer_rows(tok, [request.probe(request.prompt, request.target)])
    assert tok.decode(row.ids) == "def area(w, h):\n    return w * h\n"
    assert tok.decode(row.target) == "    return w * h\n"


def test_a_joint_that_is_no_text_is_refused():
    with pytest.raises(RequestError, match=r"Request 0, field 'joint': is a bool, not text\. Give a space"):
        parse_requests({**FACT, "joint": False})
    with pytest.raises(RequestError, match="Request 0, field 'joint': is a int"):
        edit_quality(None, None, [{**FACT, "joint": 1}])


def test_a_file_has_a_joint_for_records_without_one(tmp_path):
    counterfact = {"requested_rewrite": {"prompt": "{} is", "subject": "Ada", "target_new": {"str": "a"},
        "target_true": {"str": "b"}}, "neighborhood_prompts": ["Bea is"]}  # fmt: skip
    zsre = {"subject": "Ada", "src": "Who is Ada?", "alt": "she"}
    records = [FACT, {**FACT, "joint": " "}, counterfact, zsre]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    found = read_records(tmp_path / "records.json", joint="")
    assert [record.request.joint for record in found] == ["", " ", "", ""]
    assert [record.easyedit["joint"] for record in found] == ["", " ", "", ""]
    assert found[0].request.neighbors == (Probe("Cake is made of", "flour", ""),)
    assert {record.request.joint for record in read_records(tmp_path / "records.json")} == {None, " "}


def test_requests_with_a_joint_survive_a_ledger():
    (request,) = parse_requests({**FACT, "joint": ""})
    values = json.loads(json.dumps(request.to_dict()))
    assert EditRequest.from_dict(values) == request
    assert values["neighbors"] == [["Cake is made of", "flour"]]
    (old,) = parse_requests(FACT)
    assert "joint" not in old.to_dict()
    assert "chat" not in old.to_dict()
