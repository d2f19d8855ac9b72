"""Items of EasyEdit's data sets are requests."""

import json

import pytest

from easyedit_rls import RequestError, parse_requests
from easyedit_rls.data.records import read_records
from easyedit_rls.host import zsre_requests

ZSRE = [
    {
        "subject": "Watts Humphrey",
        "src": "What university did Watts Humphrey attend?",
        "alt": "University of Michigan",
        "answers": ["Trinity College"],
        "rephrase": "What university did Watts Humphrey take part in?",
        "loc": "nq question: who played desmond doss father in hacksaw ridge",
        "loc_ans": "Hugo Weaving",
    },
    {
        "src": "dropped",
        "alt": "",
        "answers": ["x"],
        "rephrase": "dropped",
        "loc": "nq question: x",
        "loc_ans": "y",
        "subject": "z",
    },
    {
        "subject": "lichens",
        "src": "Which family do lichens belong to?",
        "alt": "Lamiinae",
        "answers": ["Lecanorales"],
        "rephrase": "What family are lichens?",
        "loc": "nq question: types of skiing in the winter olympics 2018",
        "loc_ans": "Downhill",
    },
]


def test_counterfact_items_are_requests(easyeditor, tmp_path):
    published = {
        "case_id": 3,
        "requested_rewrite": {
            "prompt": "{} was born in",
            "subject": "Ada",
            "target_new": {"str": "Rome", "id": "Q220"},
            "target_true": {"str": "London", "id": "Q84"},
        },
        "paraphrase_prompts": ["Ada comes from"],
        "neighborhood_prompts": ["Grace was born in"],
        "generation_prompts": ["Ada lives in"],
    }
    flat = {
        "case_id": 4,
        "prompt": "The mother tongue of Ada is",
        "target_new": "French",
        "subject": "Ada",
        "ground_truth": "English",
        "rephrase_prompt": "Ada speaks",
        "locality_prompt": "Grace speaks",
        "locality_ground_truth": "Dutch",
    }
    path = tmp_path / "counterfact.json"
    path.write_text(json.dumps([published, flat]))
    dataset = easyeditor.CounterFactDataset(str(path))
    first, second = parse_requests([dataset[i] for i in range(len(dataset))])
    assert (first.prompt, first.target, first.target_true, first.case_id) == (
        "Ada was born in",
        "Rome",
        "London",
        3,
    )
    assert (second.prompt, second.subject, second.target, second.paraphrases) == (
        flat["prompt"],
        "Ada",
        "French",
        ("Ada speaks",),
    )
    assert [(n.prompt, n.answer) for n in second.neighbors] == [("Grace speaks", "Dutch")]


def test_knowedit_items_are_requests(easyeditor, tmp_path):
    recent = {
        "subject": "Leo Arons",
        "prompt": "The place of death of Leo Arons is",
        "target_new": "Berlin",
        "ground_truth": ["Paris", "Lutetia"],
        "portability": {
            "Reasoning": [{"prompt": "The mayor where Leo Arons died is", "ground_truth": [["Wegner"]]}]
        },
        "locality": {
            "Relation_Specificity": [{"prompt": "Leo Arons was born in", "ground_truth": [["Berlin"]]}]
        },
    }
    biography = {
        "concept": "Leo Arons",
        "text": "This is a text about Leo Arons. Leo Arons was",
        "labels": "a physicist.",
        "locality": {},
    }
    path = tmp_path / "knowedit.json"
    path.write_text(json.dumps([recent, biography]))
    dataset = easyeditor.KnowEditDataset(str(path))
    first, second = parse_requests([dataset[0], dataset[1]])
    assert (first.subject, first.target, first.target_true) == ("Leo Arons", "Berlin", "Paris")
    assert (second.before, second.target) == ("This is a text about Leo Arons. ", "a physicist.")


def test_zsre_items_get_their_subject_or_a_clear_error(easyeditor, tmp_path):
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps(ZSRE))
    dataset = easyeditor.ZsreDataset(str(path))
    (first,) = parse_requests(dataset[0])
    assert (first.subject, first.target, first.target_true) == (
        "Watts Humphrey",
        "University of Michigan",
        "Trinity College",
    )
    with pytest.raises(RequestError, match=r"Request 1, field 'subject'.*shares no name"):
        parse_requests([dataset[0], dataset[1]])

    found = zsre_requests(dataset, path)
    assert [request["subject"] for request in found] == ["Watts Humphrey", "lichens"]
    assert [request.subject for request in parse_requests(found)] == ["Watts Humphrey", "lichens"]


def test_zsre_subjects_need_the_right_file(easyeditor, tmp_path):
    path, other = tmp_path / "zsre.json", tmp_path / "other.json"
    path.write_text(json.dumps(ZSRE))
    other.write_text(json.dumps(ZSRE[1:]))
    with pytest.raises(RequestError, match=r"Request 0, field 'case_id'.*other.json"):
        zsre_requests(easyeditor.ZsreDataset(str(path)), other)
    path.write_text(json.dumps([{**ZSRE[0], "subject": ""}]))
    with pytest.raises(RequestError, match=r"record 0"):
        zsre_requests(easyeditor.ZsreDataset(str(path)), path)


def test_files_give_the_same_records_as_the_hosts_classes(easyeditor, tmp_path):
    """`read_records` reads what ZsreDataset and KnowEditDataset make of the same files."""
    knowedit = [
        {
            "subject": "Leo",
            "prompt": "Which family does Leo belong to?",
            "target_new": "Felidae",
            "ground_truth": ["Canidae", "dogs"],
            "portability": {
                "Reasoning": [{"prompt": "Leo's relatives are", "ground_truth": [["cats", "felines"]]}]
            },
            "locality": {
                "Relation_Specificity": [{"prompt": "The place of Leo is", "ground_truth": [["Africa"]]}]
            },
        }
    ]
    (tmp_path / "zsre.json").write_text(json.dumps(ZSRE))
    (tmp_path / "knowedit.json").write_text(json.dumps(knowedit))
    theirs = list(easyeditor.ZsreDataset(str(tmp_path / "zsre.json")))
    ours = read_records(tmp_path / "zsre.json")
    assert [record.request.case_id for record in ours] == [item["case_id"] for item in theirs]
    for record, item in zip(ours, theirs):
        for name in ("prompt", "target_new", "ground_truth", "rephrase_prompt"):
            assert record.easyedit[name] == item[name]
        near = {"prompt": [item["locality_prompt"]], "ground_truth": [item["locality_ground_truth"]]}
        assert record.easyedit["locality"] == {"neighborhood": near}
    (item,), (record,) = (
        list(easyeditor.KnowEditDataset(str(tmp_path / "knowedit.json"))),
        read_records(tmp_path / "knowedit.json"),
    )
    for name in ("subject", "prompt", "target_new"):
        assert record.easyedit[name] == item[name]
    assert record.easyedit["portability"]["Reasoning"]["prompt"] == [
        part["prompt"] for part in item["portability_r"]
    ]
    assert record.easyedit["locality"]["Relation_Specificity"]["prompt"] == [
        part["prompt"] for part in item["locality_rs"]
    ]
