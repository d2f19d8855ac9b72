"""The list of changes: which edits stand, which contradict each other, what is left of them."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from easyedit_rls.data.requests import EditRequest, Probe
from easyedit_rls.errors import RequestError
from easyedit_rls.ledger.history import Edit, Entry, History


def request(name, target="x"):
    return EditRequest("About ", name, " one says", target)


def batch(first, *names, removed=(), factor=1.0):
    n = len(names)
    data = {"importance": torch.arange(1.0, n + 1), "K.3": torch.full((n, 4), float(first)),
        "V.3": torch.arange(2.0 * n).reshape(n, 2)}  # fmt: skip
    edits = tuple(Edit(first + i, request(name), i) for i, name in enumerate(names))
    return Entry("edit", edits, removed, factors={3: factor}, data=lambda: data)


CHANGES = [batch(1, "A", "B"), batch(3, "C", factor=0.5), Entry("retract", removed=(2,)),
    batch(4, "A", removed=(1,), factor=0.5)]  # fmt: skip


def after(n):
    """The history after some of the changes."""
    history = History()
    for entry in CHANGES[:n]:
        history = history.plus(entry)
    return history


@pytest.fixture
def history():
    return after(4)


def test_what_stands(history):
    assert sorted(history.live) == [3, 4]
    assert history.n_batches == 3
    assert history.next_id == 5
    assert history.conflicts([request("A"), request("B"), request("C")]) == [3, 4]
    assert history.check([4, 3, 4]) == [3, 4]
    for unknown in ([1, 3], [9], []):
        with pytest.raises(RequestError, match=r"2 edits stand, numbers 3 to 4"):
            history.check(unknown)


def test_a_change_leaves_the_history_before_it_as_it_was(history):
    earlier = after(3)
    later = earlier.plus(CHANGES[3])
    assert list(earlier.live) == [1, 3]
    assert earlier.conflicts([request("A")]) == [1]
    assert list(later.live) == list(history.live) == [3, 4]
    again = earlier.using(5).plus(batch(5, "D"))  # a number is never used twice
    assert list(again.live) == [1, 3, 5]
    with pytest.raises(RequestError, match="number 4 was used before; the next is 5"):
        earlier.using(5).plus(batch(4, "D"))


def test_taking_out_what_does_not_stand_is_refused(history):
    with pytest.raises(RequestError, match="no such edit: 1"):
        history.plus(Entry("retract", removed=(1,)))


def test_tensors_are_in_order_and_faded(history):
    K, V, D = history.tensors([4, 3], [3])[3]
    assert K[:, 0].tolist() == [3.0, 4.0]
    assert V.tolist() == [[0.0, 1.0], [0.0, 1.0]]
    assert D.tolist() == [0.5, 1.0]
    assert after(2).tensors([2, 3], [3])[3][2].tolist() == [
        1.0,
        1.0,
    ]  # of importance 2, faded by half; of importance 1


def test_every_entry_is_read_once(history):
    reads = []
    counted = [replace(entry, data=lambda entry=entry: reads.append(1) or entry.data()) for entry in CHANGES]
    history = History().plus(counted[0]).plus(counted[1])
    history.tensors(history.live, [3])
    assert len(reads) == 2


def test_a_copy_shares_entries(history):
    assert copy.deepcopy(history).entries[0] is history.entries[0]


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
    assert (
        EditRequest("The  river ", "Oder", "  has", "a").question
        == EditRequest("The river", " Oder ", " has ", "b").question
    )
    assert (
        EditRequest("The river ", "Oder", " has", "a").question
        != EditRequest("The river ", "Elbe", " has", "a").question
    )
