"""An edit that did not take: it is told, and a batch that moved much for nothing is taken back."""

import copy
import warnings
from dataclasses import replace

import pytest

from easyedit_rls import NumericalError, RLSEditor, RLSEditWarning, UnsaidWarning
from easyedit_rls.data.requests import Probe, parse_requests
from easyedit_rls.editors.outcome import advice
from easyedit_rls.evaluation.scores import score
from tests.conftest import tiny_llama, tiny_settings
from tests.helpers import same, tensors_of

WEAK = {"mom2_update_weight": 1e6, "v_num_grad_steps": 20}  # an anchor that lets next to nothing be written


def said(model, tok, requests):
    return [
        s.is_argmax for s in score(model, tok, [Probe(r.prompt, r.target) for r in parse_requests(requests)])
    ]


@pytest.mark.filterwarnings("ignore::easyedit_rls.errors.UnsaidWarning")
def test_the_report_knows_what_the_model_says(model, tok, requests, settings):
    editor = RLSEditor(model, tok, settings(mom2_update_weight=1.0, early_stopping_margin=1.0))
    report = editor.edit(requests)
    assert [fact.is_said for fact in report.facts] == said(model, tok, requests)
    assert {fact.is_said for fact in report.facts} == {True, False}
    assert report.unsaid == [fact for fact in report.facts if not fact.is_said]
    assert [fact["is_said"] for fact in report.to_dict()["facts"]] == [fact.is_said for fact in report.facts]
    assert report.seconds["check"] > 0


def test_unsaid_facts_are_told_with_what_helps(model, tok, requests, settings):
    editor = RLSEditor(model, tok, settings(**WEAK))
    with pytest.warns(UnsaidWarning) as caught:
        report = editor.edit(requests)
    assert len(report.unsaid) == len(requests)
    (warning,) = caught
    message = str(warning.message)
    assert message.startswith("The model does not say 4 of 4 facts of batch 1: 'The river Oder' ('people'), ")
    assert f"largest miss {max(fact.miss for fact in report.facts):.2f}" in message
    assert (
        "The weights do not reach the values of 4: "
        "set keys: each, lower mom2_update_weight (1e+06), or edit more layers" in message
    )
    assert warning.filename == __file__  # where the user called
    assert issubclass(UnsaidWarning, RLSEditWarning)


def test_nothing_is_told_where_all_is_said(tok, requests):
    model = tiny_llama()
    editor = RLSEditor(model, tok, tiny_settings("llama", mom2_update_weight=1.0, early_stopping_margin=1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsaidWarning)
        report = editor.edit([requests[1], requests[3]])
    assert not report.unsaid


def test_advice_is_read_off_the_report(tok, requests):
    editor = RLSEditor(tiny_llama(), tok, tiny_settings("llama", keys="each", mom2_adjustment=False))
    fact = editor.edit(requests[:1]).facts[0]
    unwritten = replace(fact, miss=0.8, nll=0.1, is_said=False)
    short = replace(fact, miss=0.1, nll=0.9, is_said=False)
    (weights_short,) = advice([unwritten], editor.hparams)
    assert (
        weights_short
        == "The weights do not reach the values of 1: lower lambda_reg (0.1), or edit more layers."
    )
    (value_short,) = advice([short], editor.hparams)
    assert (
        "fall short for 1 (NLL up to 0.9 nats a token): raise v_num_grad_steps (20) or clamp_norm_factor (4)"
        in value_short
    )
    assert len(advice([replace(fact, miss=0.8, nll=5.0)], editor.hparams)) == 2
    assert len(advice([unwritten, short], editor.hparams)) == 2


def large_step(model, tok, settings, requests, **changes):
    """An editor in whose next batch nothing is said, for a value too weak, and the step is large."""
    editor = RLSEditor(
        model, tok, settings(values="gradient", gradient_step=30.0, mom2_update_weight=0.1, **changes)
    )
    return editor, [
        {**requests[0], "target_new": "people slow leaves water"},
        {**requests[1], "target_new": "well slow people leaves"},
    ]


def test_a_batch_that_moves_much_for_nothing_is_taken_back(model, tok, requests, settings):
    editor, bad = large_step(model, tok, settings, requests, max_deviation=0.5)
    before, templates = tensors_of(model), editor.state.n_edits
    with pytest.raises(NumericalError) as caught:
        editor.edit(bad)
    message = str(caught.value)
    assert "moved layer" in message
    assert "does not say 2 of its 2 facts" in message
    assert message.endswith("or set max_deviation: off.")
    assert same(tensors_of(model), before)
    assert editor.n_edits == templates == 0
    with pytest.raises(NumericalError):
        editor.edit(
            bad
        )  # the refused batch is not remembered: it is refused again, not taken for a change of the weights
    editor.hparams = replace(editor.hparams, max_deviation="off")
    report = editor.edit(bad)
    assert len(report.unsaid) == 2
    assert max(layer.step for layer in report.layers) > 0.5
    assert not same(tensors_of(model), before)


def test_a_refused_batch_leaves_the_earlier_ones(model, tok, requests, settings):
    twin = copy.deepcopy(model)
    editor, bad = large_step(model, tok, settings, requests, max_deviation="off")
    other, _ = large_step(twin, tok, settings, requests, max_deviation="off")
    for one in (editor, other):
        one.edit(requests[3:])
    held = tensors_of(model)
    editor.hparams = replace(editor.hparams, max_deviation=0.5)
    with pytest.raises(NumericalError):
        editor.edit(bad)
    assert same(tensors_of(model), held)
    editor.hparams = replace(editor.hparams, max_deviation="off")
    for one in (editor, other):
        one.edit(requests[2:3])
    assert same(tensors_of(model), tensors_of(twin))


def test_a_large_step_that_is_said_passes(tok, requests):
    model = tiny_llama()
    editor = RLSEditor(model, tok, tiny_settings("llama", mom2_update_weight=1.0, early_stopping_margin=1.0,
        max_deviation=0.01))  # fmt: skip
    report = editor.edit([requests[1], requests[3]])
    assert max(layer.step for layer in report.layers) > 0.01
    assert not report.unsaid


def test_a_small_step_that_is_unsaid_passes(model, tok, requests, settings):
    report = RLSEditor(model, tok, settings(max_deviation=0.5, **WEAK)).edit(requests)
    assert len(report.unsaid) == len(requests)
