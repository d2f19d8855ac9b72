"""Parsing edit requests: both formats, odd texts, and faults that name their cure."""

import copy

import pytest

from easyedit_rls.errors import RequestError
from easyedit_rls.requests import EditRequest, Probe, parse_requests

EASYEDIT = {
    "prompt": "The capital of France is",
    "subject": "France",
    "target_new": "Lyon",
    "ground_truth": "Paris",
    "rephrase_prompt": "France's capital is",
    "locality": {"neighborhood": {"prompt": "The capital of Spain is", "ground_truth": "Madrid"}},
}
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "subject": "France",
        "target_new": {"str": "Lyon", "id": "Q456"},
        "target_true": {"str": "Paris", "id": "Q90"},
    },
    "paraphrase_prompts": ["France's capital is"],
    "neighborhood_prompts": ["The Louvre stands in"],
}


def test_both_formats_state_the_same_fact():
    easyedit, counterfact = parse_requests([EASYEDIT, COUNTERFACT])
    for request in (easyedit, counterfact):
        assert (request.before, request.subject, request.after) == ("The capital of ", "France", " is")
        assert (request.target, request.target_true) == ("Lyon", "Paris")
        assert request.paraphrases == ("France's capital is",)
    assert easyedit.neighbors == (Probe("The capital of Spain is", "Madrid"),)
    assert counterfact.neighbors == (Probe("The Louvre stands in", "Paris"),)
    assert counterfact.case_id == 7


def test_requests_are_not_mutated():
    given = copy.deepcopy([EASYEDIT, COUNTERFACT])
    parse_requests(given)
    assert given == [EASYEDIT, COUNTERFACT]


def test_one_request_and_parsed_ones_are_accepted():
    (request,) = parse_requests(EASYEDIT)
    assert isinstance(request, EditRequest)
    assert parse_requests([request]) == [request]


@pytest.mark.parametrize(
    ("prompt", "subject", "before", "after"),
    [
        ("The mother of {} was", "Ada", "The mother of ", " was"),
        ("Paris, Texas lies far from Paris in", "Paris", "Paris, Texas lies far from ", " in"),  # twice: the last one
        ("Art in the style of Artists", "Art", "", " in the style of Artists"),  # a word of its own before a part of one
        ("Artists paint", "Art", "", "ists paint"),  # nothing else there
        ("東京タワーの所在地は", "東京", "", "タワーの所在地は"),
        ("The set {a, b} belongs to", "belongs", "The set {a, b} ", " to"),  # braces are just characters
        ("Say {} to {x}", "hello", "Say ", " to {x}"),
        ("The owner of Yahoo! is ", "Yahoo!", "The owner of ", " is "),  # taken as given
    ],
)
def test_where_the_subject_stands(prompt, subject, before, after):
    (request,) = parse_requests({"prompt": prompt, "subject": subject, "target_new": "x"})
    assert (request.before, request.subject, request.after) == (before, subject, after)


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"subject": "Spain"}, "prompt", "does not contain the subject 'Spain'.*Write the subject"),
        ({"prompt": "{} and {}"}, "prompt", "has 2 places"),
        ({"target_new": "  "}, "target_new", "is empty"),
        ({"target_new": None}, "target_new", "is missing"),
        ({"target_new": 7}, "target_new", "is a int, not text"),
        ({"subject": ""}, "subject", "is empty"),
        ({"importance": 0}, "importance", "positive number"),
        ({"importance": float("inf")}, "importance", "positive number"),
        ({"ground_truth": None, "neighborhood_prompts": ["Spain is"]}, "target_true", "is missing"),
        ({"locality": {"n": {"prompt": ["a", "b"], "ground_truth": ["c"]}}}, "locality", "2 prompts and 1 answers"),
        ({"rephrase_prompt": [3]}, "rephrase_prompt", "neither a text nor a list"),
    ],
)
def test_faults_name_request_field_and_cure(change, field, message):
    with pytest.raises(RequestError, match=f"Request 1, field '{field}'.*{message}") as caught:
        parse_requests([EASYEDIT, {**EASYEDIT, **change}])
    assert (caught.value.index, caught.value.field) == (1, field)


@pytest.mark.parametrize("nothing", [[], ()])
def test_an_empty_list_is_refused(nothing):
    with pytest.raises(RequestError, match="at least one"):
        parse_requests(nothing)


def test_what_is_no_mapping_is_refused():
    with pytest.raises(RequestError, match="Request 0: is a str, not a mapping"):
        parse_requests(["The capital of France is Lyon"])
