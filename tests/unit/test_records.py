"""Files of edit records in every format that people publish, and the faults they may have."""

import json

import pytest

from easyedit_rls import RequestError
from easyedit_rls.records import read_records

COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} was born in",
        "subject": "Ada",
        "target_new": {"str": "Rome", "id": "Q220"},
        "target_true": {"str": "London", "id": "Q84"},
    },
    "paraphrase_prompts": ["Ada comes from", "Ada's home is"],
    "neighborhood_prompts": ["Grace was born in", "Emmy was born in"],
    "generation_prompts": ["Ada lives in"],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "alt": "University of Michigan",
    "answers": ["Trinity College", "Trinity"],
    "rephrase": "What university did Watts Humphrey take part in?",
    "loc": "nq question: who played desmond doss father in hacksaw ridge",
    "loc_ans": "Hugo Weaving",
    "portability": {"New Question": "In which state is the university of Watts Humphrey?", "New Answer": "Michigan"},
}
KNOWEDIT = {
    "subject": "Leo",
    "prompt": "Which family does Leo belong to?",
    "target_new": "Felidae",
    "ground_truth": ["Canidae", "dogs"],
    "portability": {
        "Reasoning": [{"prompt": "Leo's relatives are", "ground_truth": [["cats", "felines"]]}],
        "Subject_Aliasing": [{"prompt": "The lion of that name is", "ground_truth": [[""]]}],
    },
    "locality": {
        "Relation_Specificity": [
            {"prompt": "The place of Leo is", "ground_truth": [["Africa"]]},
            {"prompt": "Leo is", "ground_truth": ["male"]},
        ]
    },
}
FLAT = {
    "prompt": "The mother tongue of Ada is",
    "subject": "Ada",
    "target_new": "French",
    "ground_truth": "English",
    "rephrase_prompt": "Ada speaks",
    "locality_prompt": "Grace speaks",
    "locality_ground_truth": "Dutch",
}
LEAST = {"prompt": "The owner of {} is", "subject": "the shop", "target_new": "Ann"}


def write(path, records):
    text = "\n".join(map(json.dumps, records)) if path.suffix == ".jsonl" else json.dumps(records)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["records.json", "records.jsonl"])
def test_every_format_in_one_file(tmp_path, name):
    counterfact, zsre, knowedit, flat, least = read_records(write(tmp_path / name, [COUNTERFACT, ZSRE, KNOWEDIT, FLAT, LEAST]))
    assert counterfact.request.case_id == 7
    assert counterfact.request.paraphrases == ("Ada comes from", "Ada's home is")
    assert counterfact.easyedit["rephrase_prompt"] == "Ada comes from"
    near = {"prompt": ["Grace was born in", "Emmy was born in"], "ground_truth": ["London", "London"]}
    assert counterfact.easyedit["locality"] == {"neighborhood": near}
    assert [(probe.prompt, probe.answer) for probe in counterfact.request.neighbors] == list(zip(*near.values()))
    assert counterfact.generation_prompts == ("Ada lives in",)

    assert (zsre.request.subject, zsre.request.target, zsre.request.target_true) == (
        "Watts Humphrey",
        "University of Michigan",
        "Trinity College",
    )
    assert zsre.easyedit["locality"]["neighborhood"] == {"prompt": [ZSRE["loc"]], "ground_truth": ["Hugo Weaving"]}
    assert zsre.easyedit["portability"] == {"one_hop": {"prompt": [ZSRE["portability"]["New Question"]], "ground_truth": ["Michigan"]}}
    assert zsre.request.case_id == 1

    assert knowedit.request.target_true == "Canidae"
    assert knowedit.easyedit["portability"] == {"Reasoning": {"prompt": ["Leo's relatives are"], "ground_truth": ["cats"]}}
    assert knowedit.easyedit["locality"]["Relation_Specificity"]["ground_truth"] == ["Africa", "male"]
    assert knowedit.easyedit["rephrase_prompt"] is None

    assert flat.easyedit["locality"] == {"neighborhood": {"prompt": ["Grace speaks"], "ground_truth": ["Dutch"]}}
    assert len(flat.request.neighbors) == 1
    assert (least.request.prompt, least.request.target_true) == ("The owner of the shop is", None)
    assert least.easyedit["locality"] == least.easyedit["portability"] == {}


def test_part_of_a_file(tmp_path):
    path = write(tmp_path / "records.json", [FLAT, {**ZSRE, "alt": ""}, ZSRE, LEAST])
    assert [record.request.case_id for record in read_records(path)] == [0, 2, 3]  # without a new answer there is nothing to edit
    assert [record.request.case_id for record in read_records(path, first=1, count=1)] == [2]
    with pytest.raises(RequestError, match="no record behind number 4"):
        read_records(path, first=4)


@pytest.mark.parametrize(
    ("record", "field", "problem"),
    [
        ({**FLAT, "target_new": None}, "target_new", "missing"),
        ({**COUNTERFACT, "requested_rewrite": "x"}, "requested_rewrite", "not a mapping"),
        ({**KNOWEDIT, "locality": {"Forgetfulness": [{"prompt": "x"}]}}, "locality.Forgetfulness", "not a list of"),
        ({**KNOWEDIT, "portability": ["x"]}, "portability", "not a mapping"),
        ({**KNOWEDIT, "portability": {"hop": {"prompt": ["a", "b"], "ground_truth": ["c"]}}}, "portability.hop", "1 answers for 2"),
        ({**ZSRE, "loc_ans": None}, "locality.neighborhood.ground_truth", "neither a text"),
        ({**COUNTERFACT, "generation_prompts": "x"}, "generation_prompts", "list of texts"),
        ("x", "", "is a str"),
    ],
)
def test_faults_name_file_record_and_field(tmp_path, record, field, problem):
    path = write(tmp_path / "records.json", [FLAT, record])
    with pytest.raises(RequestError, match=problem) as caught:
        read_records(path)
    assert caught.value.index == 1
    assert caught.value.field == field
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.json", "{}", "holds a dict"),
        ("a.json", "[", "no JSON"),
        ("a.jsonl", '{"a": 1}\nx', "line 2 is no JSON"),
        ("a.json", "[]", "has no record"),
    ],
)
def test_faults_of_files(tmp_path, name, text, problem):
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=problem):
        read_records(tmp_path / name)
    with pytest.raises(RequestError, match="can't be read"):
        read_records(tmp_path / "none.json")
