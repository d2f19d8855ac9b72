"""The list of changes: which edits stand, which contradict each other, what is left of them."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyedit_rls.errors import RequestError
from easyedit_rls.history import Edit, Entry, History
from easyedit_rls.requests import EditRequest, Probe


def request(name, target="x"):
    return EditRequest("About ", name, " one says", target)


def batch(first, *names, removed=(), factor=1.0):
    n = len(names)
    data = {"importance": torch.arange(1.0, n + 1), "K.3": torch.full((n, 4), float(first)), "V.3": torch.arange(2.0 * n).reshape(n, 2)}
    edits = tuple(Edit(first + i, request(name), i) for i, name in enumerate(names))
    return Entry("edit", edits, removed, {3: factor}, data=lambda: data)


@pytest.fixture
def history():
    history = History()
    history.add(batch(1, "A", "B"))
    history.add(batch(3, "C", factor=0.5))
    history.add(Entry("retract", removed=(2,)))
    history.add(batch(4, "A", removed=(1,), factor=0.5))
    return history


def test_what_stands(history):
    assert sorted(history.live) == [3, 4]
    assert history.n_batches == 3
    assert history.next_id == 5
    assert history.conflicts([request("A"), request("B"), request("C")]) == [3, 4]
    assert history.check([4, 3, 4]) == [3, 4]
    for unknown in ([1, 3], [9], []):
        with pytest.raises(RequestError, match=r"2 edits stand, numbers 3 to 4"):
            history.check(unknown)


def test_dropping_the_last_brings_back_what_it_removed(history):
    history.drop_last()
    assert sorted(history.live) == [1, 3]
    assert history.conflicts([request("A")]) == [1]
    history.drop_last()
    assert sorted(history.live) == [1, 2, 3]
    assert history.next_id == 5  # a number is never used twice


def test_tensors_are_in_order_and_faded(history):
    K, V, D = history.tensors([4, 3], [3])[3]
    assert K[:, 0].tolist() == [3.0, 4.0]
    assert V.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert D.tolist() == [0.5, 1.0]
    history.drop_last()
    history.drop_last()
    assert history.tensors([2, 3], [3])[3][2].tolist() == [1.0, 1.0]  # of importance 2, faded by half; of importance 1


def test_a_copy_shares_entries_and_nothing_else(history):
    twin = copy.deepcopy(history)
    twin.drop_last()
    assert sorted(history.live) == [3, 4]
    assert twin.entries[0] is history.entries[0]


def test_an_entry_survives_json(history):
    for entry in history.entries:
        again = Entry.from_dict(json.loads(json.dumps(entry.to_dict())), entry.data)
        assert again == entry


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(
    made=st.builds(
        EditRequest,
        before=text,
        subject=text,
        after=text,
        target=text,
        target_true=st.none() | text,
        importance=st.floats(0.1, 10),
        paraphrases=st.lists(text, max_size=2).map(tuple),
        neighbors=st.lists(st.builds(Probe, prompt=text, answer=text), max_size=2).map(tuple),
        case_id=st.none() | st.integers() | text,
    )
)
def test_a_request_survives_json(made):
    assert EditRequest.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_the_same_question_whatever_the_spacing():
    assert EditRequest("The  river ", "Oder", "  has", "a").question == EditRequest("The river", " Oder ", " has ", "b").question
    assert EditRequest("The river ", "Oder", " has", "a").question != EditRequest("The river ", "Elbe", " has", "a").question
