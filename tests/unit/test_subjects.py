"""Subjects found from a rewording."""

import pytest

from easyedit_rls import RequestError, parse_requests
from easyedit_rls.data.subjects import find_subject


@pytest.mark.parametrize(("prompt", "rewording", "subject"), [
    ("What university did Watts Humphrey take part in?", "What university was Watts Humphrey a part of?",
        "Watts Humphrey"),
    ("Which family does Ramalinaceae belong to?", "What family are Ramalinaceae?", "Ramalinaceae"),
    ("What role does Denny Herzig play in football?", "What's Denny Herzig's role in football?",
        "Denny Herzig"),
    ("Pyotr Lebedev's domain of work is", "The domain of work of Pyotr Lebedev is", "Pyotr Lebedev"),
    ("Who made the iPad Air 2?", "By whom was the iPad Air 2 made?", "iPad Air 2"),
    ("When did USS Leedstown (APA-56) sail?", "USS Leedstown (APA-56) sailed when?",
        "USS Leedstown (APA-56)"),
    ("李白 was born in", "The birthplace of 李白 is", "李白"),
])  # fmt: skip
def test_the_shared_name_is_found(prompt, rewording, subject):
    assert find_subject(prompt, rewording) == subject


@pytest.mark.parametrize(("prompt", "rewording", "what"), [
    ("what is water made of?", "what does water consist of?", "no name"),
    ("Did Anna meet Boris?", "Was Boris met by Anna?", "several names, 'Anna', 'Boris'"),
])  # fmt: skip
def test_no_name_or_several_are_refused(prompt, rewording, what):
    with pytest.raises(RequestError, match=what):
        find_subject(prompt, rewording)


def test_only_zsre_items_are_guessed():
    item = {"prompt": "Where does Anna Keller live?",
        "rephrase_prompt": "In which town does Anna Keller live?", "target_new": "Bern"}  # fmt: skip
    (request,) = parse_requests({**item, "cond": "Rome >> Bern || Where does Anna Keller live?"})
    assert request.subject == "Anna Keller"
    with pytest.raises(RequestError, match="field 'subject': is missing"):
        parse_requests(item)
