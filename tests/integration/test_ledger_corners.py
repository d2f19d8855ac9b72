"""Corners where weights, memory and disk once came apart."""

import copy
import os
import shutil
import signal
import warnings

import pytest
import torch

from easyedit_rls import LedgerError, NumericalError, RLSEditor, UnsaidWarning
from easyedit_rls._base.interrupts import deferred_interrupts
from easyedit_rls.cli.main import main
from easyedit_rls.ledger import ledger as ledger_module
from easyedit_rls.ledger.reading import at_one_moment, latest
from easyedit_rls.ledger.snapshot import read_history, read_moment
from easyedit_rls.model.weights import EditedWeight
from tests.conftest import tiny_llama, tiny_settings
from tests.helpers import edited_weights, same
from tests.tolerances import REPLAYED

FACTS = [
    {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"},
    {"prompt": "Bakers know rye", "subject": "rye", "target_new": "well"},
    {"prompt": "Anna Maria Keller", "subject": "Anna Maria Keller", "target_new": "water"},
]


@pytest.fixture
def make(tok):
    def make(folder, **changes):
        hp = tiny_settings("llama", v_num_grad_steps=2, context_templates=[], **changes)
        return RLSEditor(tiny_llama(), tok, hp, state_dir=folder)

    return make


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_handler_that_closes_the_editor_in_the_middle_of_an_edit(make, tmp_path, monkeypatch, goes_on):
    editor = make(tmp_path)
    editor.edit(FACTS[0])
    before = edited_weights(editor)

    def close(*_):
        editor.close()
        if not goes_on:
            raise SystemExit

    def at_the_check(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        return [True]

    monkeypatch.setattr("easyedit_rls.editors.rls.find_said", at_the_check)
    handler = signal.signal(signal.SIGTERM, close)
    try:
        with pytest.raises(LedgerError if goes_on else SystemExit):
            editor.edit(FACTS[1])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert same(edited_weights(editor), before)
    again = make(tmp_path)
    assert again.n_edits == editor.n_edits == 1
    assert same(edited_weights(again), before)
    again.close()


def test_what_could_not_be_undone_is_undone_by_close(make, tmp_path, monkeypatch):
    editor = make(tmp_path, checkpoint_every=1)
    editor.edit(FACTS[0])
    editor.state.checkpoint(1)
    before = edited_weights(editor)

    def fail(*_):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        real = ledger_module.commit_file

        def fail_behind(*args):
            real(*args)
            fail()

        patch.setattr(ledger_module, "commit_file", fail_behind)
        patch.setattr(ledger_module, "put_back", fail)
        with pytest.raises(LedgerError, match="can't be taken back either"):
            editor.edit(FACTS[1])
        assert same(edited_weights(editor), before)
        assert len(read_history(latest(tmp_path)).live) == 2
    editor.close()
    again = make(tmp_path)
    assert again.n_edits == 1
    assert same(edited_weights(again), before)
    again.close()


def test_a_layer_that_was_summed_anew_is_after_compaction_too(make, tmp_path):
    with make(tmp_path) as editor:
        editor.edit(FACTS[0])
        editor.edit({**FACTS[1], "importance": 1e6})
        editor.edit(FACTS[2])
    assert any(entry.rebuilt for entry in editor.state.history.entries)
    assert main(["state", "compact", str(tmp_path)]) == 0
    now, replayed = (read_moment(latest(tmp_path), from_start=from_start) for from_start in (False, True))
    for layer, solution in now.solutions.items():
        torch.testing.assert_close(replayed.solutions[layer].weight, solution.weight, **REPLAYED)


def test_weights_that_are_not_finite_are_not_adopted(make, tmp_path):
    editor = make(tmp_path)
    editor.edit(FACTS[0])
    before = edited_weights(editor)
    editor.layout.edited[1].parameter.data[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="weight of layer 1 holds NaN"):
        editor.adopt_weights()
    for layer, snapshot in before.items():
        editor.layout.edited[layer].restore(snapshot)
    editor.rollback()
    assert editor.n_edits == 0


def test_a_deep_copy_needs_nothing_of_the_ledger(make, tok, tmp_path):
    editor = make(tmp_path)
    editor.edit(FACTS[0])
    editor.edit(FACTS[1])
    twin = RLSEditor(copy.deepcopy(editor.model), tok, editor.hparams, state=copy.deepcopy(editor.state))
    editor.retract(1)
    editor.close()
    shutil.rmtree(tmp_path)
    twin.retract(1)
    assert same(edited_weights(twin), edited_weights(editor))
    twin.rollback()
    twin.edit({**FACTS[2], "importance": 1e6})  # sums anew


def test_a_copy_of_hard_links_goes_its_own_way(make, tmp_path):
    with make(tmp_path / "one") as editor:
        editor.edit(FACTS[0])
    shutil.copytree(tmp_path / "one", tmp_path / "other", copy_function=os.link)
    (tmp_path / "other" / "ledger.lock").unlink()
    for name, fact in (("one", FACTS[1]), ("other", FACTS[2])):
        with make(tmp_path / name) as editor:
            editor.edit(fact)
    for name, fact in (("one", FACTS[1]), ("other", FACTS[2])):
        assert [edit.request.prompt for edit in read_history(latest(tmp_path / name)).live.values()] == [
            FACTS[0]["prompt"],
            fact["prompt"],
        ]
        assert main(["state", "verify", str(tmp_path / name)]) == 0


@pytest.mark.parametrize("text", ["a" * 9_000_000, "語" * 3_000_000])
def test_texts_too_long_to_be_read_back_are_not_written(make, tmp_path, text):
    editor = make(tmp_path)
    editor.edit(FACTS[0])
    before = edited_weights(editor)
    with pytest.raises(LedgerError, match="a ledger takes 8 MB at once"):
        editor.edit({**FACTS[1], "rephrase_prompt": text})
    assert same(edited_weights(editor), before)
    editor.edit({**FACTS[1], "rephrase_prompt": "x" * 1_000_000 + "語" * 500_000})
    editor.close()
    assert make(tmp_path).n_edits == 2


@pytest.mark.parametrize("folder", ["~nobody-has-this-home/x", "x" * 300, "a\0b"])
def test_folders_that_can_not_be(make, folder):
    with pytest.raises(LedgerError, match=r"Give another state_dir|can't be written"):
        make(folder)


def test_every_signal_that_was_held_comes_through():
    came = []

    def handler(number, frame):
        came.append(number)
        if number == signal.SIGTERM:
            raise InterruptedError

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(InterruptedError), deferred_interrupts():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == []
        assert sorted(came) == sorted((signal.SIGINT, signal.SIGTERM))
        assert all(signal.getsignal(number) is handler for number in before)
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def test_a_warning_that_is_an_error_comes_after_the_edit(make, tmp_path):
    editor = make(tmp_path)
    with warnings.catch_warnings(), pytest.raises(UnsaidWarning):
        warnings.simplefilter("error")
        editor.edit(FACTS)
    assert editor.n_edits == len(read_history(latest(tmp_path)).live) == 3
    editor.edit({**FACTS[0], "target_new": "bread"})
    editor.close()


def test_a_weight_that_does_not_take_what_is_written_is_told(make, tmp_path, monkeypatch):
    """As where something computes it anew behind the package's back."""
    editor = make(tmp_path)
    editor.edit(FACTS[0])
    before = edited_weights(editor)
    real = EditedWeight.write
    with monkeypatch.context() as patch, pytest.raises(NumericalError, match="do not hold what was written"):
        patch.setattr(EditedWeight, "write", lambda weight, W: real(weight, W * 1.001))
        editor.edit(FACTS[1])
    for layer, snapshot in before.items():  # the undoing could not be written either
        editor.layout.edited[layer].restore(snapshot)
    assert editor.n_edits == len(read_history(latest(tmp_path)).live) == 1
    editor.rollback()
    editor.close()


def test_after_compaction_a_model_saved_before_what_was_dropped_is_still_known(make, tok, tmp_path):
    """The retracted edit is gone from the ledger; the weights that held it are known by their fingerprint."""
    with make(tmp_path) as editor:
        old = copy.deepcopy(editor.model)
        editor.edit(FACTS[0])
        old.load_state_dict(editor.model.state_dict())
        editor.edit(FACTS[1])
        editor.retract(1)
        editor.edit(FACTS[2])
        wanted = edited_weights(editor)
    assert main(["state", "compact", str(tmp_path)]) == 0
    with RLSEditor(old, tok, editor.hparams, state_dir=tmp_path) as again:
        assert same(edited_weights(again), wanted)


def test_what_a_reader_found_amiss_while_a_writer_was_at_work_is_read_again(make, tmp_path):
    """A fault counts only where nothing has changed meanwhile."""
    reads = []
    with make(tmp_path) as editor:
        editor.edit(FACTS[0])

        def read(journal):
            reads.append(journal)
            if len(reads) == 1:
                editor.edit(FACTS[1])
                raise LedgerError("half of it was of another moment")
            return read_history(journal)

        assert len(at_one_moment(tmp_path, read).live) == 2
        with pytest.raises(LedgerError, match="always"):
            at_one_moment(tmp_path, lambda journal: (_ for _ in ()).throw(LedgerError("always")))
