"""Parsing edit requests: both formats, odd texts, and faults that name their cure."""

import copy
import json

import numpy as np
import pytest

from easyedit_rls.data.requests import EditRequest, Probe, parse_requests
from easyedit_rls.errors import RequestError

EASYEDIT = {"prompt": "The capital of France is", "subject": "France", "target_new": "Lyon",
    "ground_truth": "Paris", "rephrase_prompt": "France's capital is",
    "locality": {"neighborhood": {"prompt": "The capital of Spain is",
    "ground_truth": "Madrid"}}}  # fmt: skip
COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {"prompt": "The capital of {} is", "subject": "France",
        "target_new": {"str": "Lyon", "id": "Q456"}, "target_true": {"str": "Paris", "id": "Q90"}},
    "paraphrase_prompts": ["France's capital is"],
    "neighborhood_prompts": ["The Louvre stands in"],
}  # fmt: skip


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


def test_rewordings_have_three_names():
    request = {"prompt": "Ada speaks", "subject": "Ada", "target_new": "French",
        "rephrase": ["Ada talks", "Ada's tongue is"]}  # fmt: skip
    (parsed,) = parse_requests(
        [{**request, "rephrase_prompt": "Ada talks", "paraphrase_prompts": ["Ada says"]}]
    )
    assert parsed.paraphrases == ("Ada says", "Ada talks", "Ada's tongue is")  # each once


@pytest.mark.parametrize(
    ("prompt", "subject", "before", "after"),
    [
        ("The mother of {} was", "Ada", "The mother of ", " was"),
        (
            "Paris, Texas lies far from Paris in",
            "Paris",
            "Paris, Texas lies far from ",
            " in",
        ),  # twice: the last one
        (
            "Art in the style of Artists",
            "Art",
            "",
            " in the style of Artists",
        ),  # a word of its own before a part of one
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


@pytest.mark.parametrize(("change", "field", "message"), [
    ({"subject": "Spain"}, "prompt", "does not contain the subject 'Spain'.*Write the subject"),
    ({"prompt": "{} and {}"}, "prompt", "has 2 places"),
    ({"target_new": "  "}, "target_new", "is empty"),
    ({"target_new": None}, "target_new", "is missing"),
    ({"target_new": 7}, "target_new", "is a int, not text"),
    ({"subject": ""}, "subject", "is empty"),
    ({"importance": 0}, "importance", "from 1e-06 to 1e"),
    ({"importance": float("inf")}, "importance", "from 1e-06 to 1e"),
    ({"importance": float("nan")}, "importance", "from 1e-06 to 1e"),
    ({"importance": 10**400}, "importance", "a very long number"),
    ({"importance": 1e7}, "importance", "from 1e-06 to 1e"),
    ({"importance": True}, "importance", "is True"),
    ({"case_id": 10**5000}, "case_id", "is a int"),
    ({"case_id": 1.5}, "case_id", "is a float"),
    ({"case_id": ["a"]}, "case_id", "is a list"),
    ({"ground_truth": None, "neighborhood_prompts": ["Spain is"]}, "target_true", "is missing"),
    ({"locality": {"n": {"prompt": ["a", "b"], "ground_truth": ["c"]}}}, "locality",
        "2 prompts and 1 answers"),
    ({"rephrase_prompt": [3]}, "rephrase_prompt", "neither a text nor a list"),
])  # fmt: skip
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


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("The Cafe\u0301 Central is in", "Caf\u00e9 Central", "Cafe\u0301 Central"),
        ("The Caf\u00e9 Central is in", "Cafe\u0301 Central", "Caf\u00e9 Central"),
        ("Where is the Eiffel\u00a0Tower?", "Eiffel Tower", "Eiffel\u00a0Tower"),
        ("Where is the Eiffel Tower?", "Eiffel\u202fTower", "Eiffel Tower"),
        ("Where is the Eiffel  Tower?", "Eiffel Tower", "Eiffel  Tower"),
        ("L’Aquila lies in", "L'Aquila", "L’Aquila"),
        ("O'Neill wrote", "O’Neill", "O'Neill"),
        ("The song “Hey” “Jude” is by", '"Jude"', "“Jude”"),
        ("\u1112\u1161\u11ab강의 길이는", "한강", "\u1112\u1161\u11ab강"),
        ("a\u0323\u0302 is", "\u1ead", "a\u0323\u0302"),
        ("The Eiffel Tower is in", " Eiffel Tower ", "Eiffel Tower"),  # white space around it is none of it
    ],
)
def test_a_subject_is_found_however_it_is_written(prompt, subject, found):
    (request,) = parse_requests({"prompt": prompt, "subject": subject, "target_new": "x"})
    assert request.subject == found
    assert request.prompt == prompt
    assert request.before + found + request.after == prompt


def test_a_subject_is_not_found_within_an_accented_letter():
    with pytest.raises(RequestError, match="does not contain the subject 'Cafe'"):
        parse_requests({"prompt": "The Caf\u00e9 Central is in", "subject": "Cafe", "target_new": "x"})


@pytest.mark.parametrize(("one", "other", "is_same"), [
    (("The Eiffel Tower stands in", "Eiffel Tower"), ("The Eiffel Tower stands in", "The Eiffel Tower"),
        True),
    (("The Caf\u00e9 stands in", "Caf\u00e9"), ("The Cafe\u0301 stands in", "Cafe\u0301"), True),
    (("The Eiffel\u00a0Tower stands  in ", "Tower"), ("The Eiffel Tower stands in", "Tower"), True),
    (("The Eiffel Tower stands in", "Tower"), ("The Eiffel Tower lies in", "Tower"), False),
    (("The eiffel tower stands in", "tower"), ("The Eiffel Tower stands in", "Tower"), False),
])  # fmt: skip
def test_what_is_asked_is_the_whole_prompt(one, other, is_same):
    first, second = parse_requests(
        [{"prompt": prompt, "subject": subject, "target_new": "x"} for prompt, subject in (one, other)]
    )
    assert (first.question == second.question) == is_same


def test_a_space_before_a_target_is_no_other_answer():
    given = {"prompt": "The Eiffel Tower stands in", "subject": "Eiffel Tower"}
    with_space, without, other = parse_requests(
        [{**given, "target_new": target} for target in (" Rome", "Rome", "Lyon")]
    )
    assert with_space.continuation == without.continuation != other.continuation


@pytest.mark.parametrize("importance", [-5, 0.0, float("nan"), 1e9, "1"])
def test_a_request_made_by_hand_is_looked_at_too(importance):
    with pytest.raises(RequestError, match=r"Request 1, field 'importance'"):
        parse_requests([EASYEDIT, EditRequest("The ", "sea", " is", "blue", importance=importance)])


def test_numbers_of_numpy_are_numbers():
    (request,) = parse_requests({**EASYEDIT, "importance": np.float32(0.5), "case_id": np.int64(7)})
    assert (request.importance, request.case_id) == (0.5, 7)
    assert (type(request.importance), type(request.case_id)) == (float, int)
    json.dumps(request.to_dict())
