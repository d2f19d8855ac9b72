"""Edits that later ones push aside are found and edited again."""

import copy

import pytest
import torch

from easyedit_rls import RLSEditor, parse_requests
from easyedit_rls.data.requests import Probe
from easyedit_rls.editors.rehearsal import due_edits, lost_edits
from easyedit_rls.evaluation.scores import score
from easyedit_rls.ledger.history import Edit, Entry, History

FIRST = {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"}
RIVALS = [  # nearly the same key, another value
    {"prompt": f"{text} Oder", "subject": "Oder", "target_new": "water"}
    for text in ("A river", "Our river", "The old river", "No river", "The lake", "The sea", "The")
]
OTHER = {"prompt": "Bakers know {}", "subject": "rye", "target_new": "well"}


@pytest.fixture
def hparams(settings, family):
    """Soft enough for an edit to land, stiff enough for the rivals to push it aside."""
    weight = {"gpt2": 1.0, "llama": 20.0}[family]
    return lambda **changes: settings(mom2_update_weight=weight, early_stopping_margin=1.0, **changes)


def says(editor, request):
    (parsed,) = parse_requests(request)
    return score(editor.model, editor.tok, [Probe(parsed.prompt, parsed.target)])[0].is_argmax


def pushed_aside(model, tok, hparams, **more):
    """An editor whose first edit was pushed aside by its second batch."""
    editor = RLSEditor(model, tok, hparams, **more)
    assert editor.edit(FIRST).rehearsed == []
    assert says(editor, FIRST)
    assert editor.edit(RIVALS).rehearsed == []  # looked at before the rivals came: it was still there
    assert not says(editor, FIRST)
    return editor


def test_what_was_lost_is_edited_again_with_the_next_batch(model, tok, hparams):
    editor = pushed_aside(model, tok, hparams(rehearsal=8))
    report = editor.edit(OTHER)
    assert (report.rehearsed, report.superseded) == ([1], [])
    assert [(fact.edit_id, fact.prompt) for fact in report.facts] == [
        (9, "Bakers know rye"),
        (10, "The river Oder"),
    ]
    assert sorted(editor.state.history.live) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert says(editor, FIRST)
    assert says(editor, OTHER)
    assert 0 < report.seconds["rehearsal"] < report.seconds_per_edit  # one request paid for both


def test_without_rehearsal_it_stays_lost(model, tok, hparams):
    editor = pushed_aside(model, tok, hparams())
    assert editor.edit(OTHER).rehearsed == []
    assert not says(editor, FIRST)


def test_it_is_one_change(model, tok, hparams):
    editor = pushed_aside(model, tok, hparams(rehearsal=8))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    editor.edit(OTHER)
    editor.rollback()
    assert sorted(editor.state.history.live) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_on_demand_and_from_the_ledger(model, tok, hparams, tmp_path):
    """`rehearse` looks at all; a new process, with the ledger alone, finds the same state."""
    base = copy.deepcopy(model)
    editor = pushed_aside(model, tok, hparams(), state_dir=tmp_path)
    assert editor.rehearse().rehearsed == [1]
    assert says(editor, FIRST)
    assert editor.n_edits == 8
    editor.close()
    with RLSEditor(base, tok, hparams(), state_dir=tmp_path) as again:
        assert again.n_edits == 8
        assert all(torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters()))


def test_nothing_to_rehearse(model, tok, hparams):
    editor = RLSEditor(model, tok, hparams())
    assert editor.rehearse() is None
    editor.edit(FIRST)
    assert editor.rehearse() is None
    assert editor.state.n_batches == 1


def history_of(*requests):
    history = History()
    for number, request in enumerate(parse_requests(list(requests)), 1):
        history = history.plus(Entry("edit", (Edit(number, request, 0),)))
    return history


def test_each_has_its_turn():
    """Two a batch: after three batches all five were looked at, and a restart goes on where it was."""
    history = history_of(*({**OTHER, "subject": f"rye{n}"} for n in range(5)))
    turns = []
    for n_batches in range(5, 8):
        assert history.n_batches == n_batches
        turns.append([edit.edit_id for edit in due_edits(history, 2)])
        history = history.plus(Entry("edit"))
    assert turns == [[1, 2], [3, 4], [5, 1]]
    assert [edit.edit_id for edit in due_edits(history, 9, besides=[2, 3])] == [1, 4, 5]
    assert due_edits(history, 0) == due_edits(History(), 3) == []


def test_of_several_answers_to_one_prompt_only_the_newest_is_looked_at():
    history = history_of(FIRST, {**FIRST, "target_new": "water"}, OTHER)
    assert sorted(edit.edit_id for edit in due_edits(history, 9)) == [2, 3]


def test_lost_means_that_another_text_is_more_probable(model, tok, hparams):
    editor = pushed_aside(model, tok, hparams())
    standing = due_edits(editor.state.history, 9)
    assert [edit.edit_id for edit in lost_edits(model, tok, standing, 64)] == [1]
    assert lost_edits(model, tok, [], 64) == []
