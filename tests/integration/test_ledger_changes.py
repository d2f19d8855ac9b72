"""Edits are superseded, amended and retracted as the batch solution has it, and rounding does not pile up."""

import math

import pytest
import torch

from easyedit_rls import RequestError, RLSEditor
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.rebuild import rebuilt
from easyedit_rls.ledger.snapshot import read_moment, read_prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.conftest import FAMILIES, spoil, tiny_settings
from tests.helpers import FORGETTING, content, edited_weights, same, same_state
from tests.tolerances import FLOAT32, WEIGHTS


def test_the_same_prompt_again_supersedes(fresh, requests, settings):
    """As one change, and to rounding what retracting and editing give as two."""
    again = {**requests[0], "prompt": "The  river {} ", "target_new": "water"}
    one, two = fresh(settings()), fresh(settings())
    for editor in (one, two):
        editor.edit(requests)
    two.retract(1)
    assert two.edit(again).superseded == []
    report = one.edit(again)
    assert (report.superseded, [fact.edit_id for fact in report.facts], report.n_edits) == ([1], [5], 4)
    for layer, solution in one.state.layers.items():
        moved = (solution.weight - one.state.unedited[layer]).norm()
        assert float((solution.weight - two.state.layers[layer].weight).norm() / moved) < FLOAT32
    one.rollback()
    two.rollback()  # takes back the edit alone
    assert (one.n_edits, two.n_edits) == (4, 3)


def test_conflicts(fresh, requests, settings):
    other = {**requests[0], "target_new": "water"}
    keeping = fresh(settings(on_conflict="keep"))
    keeping.edit(requests)
    assert keeping.edit([other, requests[0]]).n_edits == 6
    strict = fresh(settings(on_conflict="error"))
    strict.edit(requests[:2])
    before = edited_weights(strict)
    with pytest.raises(RequestError, match="edited before, as edits 1"):
        strict.edit([other, requests[3]])
    assert same(edited_weights(strict), before)
    assert strict.amend(1, other).superseded == [1]  # what is amended is no conflict
    with pytest.raises(RequestError, match="edited before, as edits 3"):
        strict.amend(2, other)
    for editor in (strict, fresh(settings())):
        with pytest.raises(
            RequestError, match=r"Request 1: .*'water', but another request of this batch 'people'"
        ):
            editor.edit([requests[0], other])
    twice = fresh(settings())
    assert twice.edit([requests[0], requests[0]]).n_edits == 2  # the same target twice is no contradiction
    assert twice.edit(other).superseded == [1, 2]
    twice.rollback()
    assert twice.n_edits == 2
    assert twice.edit(other).superseded == [1, 2]


def test_another_subject_in_the_same_prompt_supersedes(fresh, settings):
    """Both answers used to be kept, and rehearsal edited the old one in again."""
    fact = {"prompt": "The slow river Oder", "subject": "Oder", "target_new": "people"}
    editor = fresh(settings(rehearsal=8))
    editor.edit(fact)
    report = editor.edit({**fact, "subject": "river Oder", "target_new": "water"})
    assert (report.superseded, report.rehearsed, report.n_edits) == ([1], [], 1)
    rehearsed = editor.rehearse()
    assert rehearsed is None or rehearsed.rehearsed == [2]
    strict = fresh(settings())
    with pytest.raises(
        RequestError, match=r"Request 1: .*'water', but another request of this batch 'people'"
    ):
        strict.edit([fact, {**fact, "subject": "The slow river Oder", "target_new": "water"}])
    assert (
        strict.edit([fact, {**fact, "prompt": "A slow river Oder", "target_new": "water"}]).n_edits == 2
    )  # the twin: another prompt


@pytest.mark.parametrize("forgetting", FORGETTING)
def test_retraction_and_amendment_equal_the_batch_solution(fresh, requests, settings, tmp_path, forgetting):
    """Judged in float64 from what the ledger holds: keys, targets, importances, factors."""
    hp = settings(**forgetting)
    editor = fresh(hp, tmp_path)
    for request in requests:
        editor.edit({**request, "importance": 0.7})
    editor.retract([4, 2])
    report = editor.amend(1, {**requests[0], "target_new": "water"})
    assert report.superseded == [1]
    assert sorted(editor.state.history.live) == [3, 5]
    for layer, solution in editor.state.layers.items():
        prior = read_prior(latest(tmp_path), layer)
        A = torch.linalg.inv(prior.solution.covariance().double())
        K, V, D = (tensor.double() for tensor in editor.state.history.tensors([3, 5], [layer])[layer])
        later = [entry.factors[layer] for entry in editor.state.history.entries if entry.kind == "edit"][3:]
        assert D.tolist() == pytest.approx([0.7 * math.prod(later), 1.0])
        W_0 = prior.unedited.double()
        exact = W_0 + torch.linalg.solve(A + K.T @ (D[:, None] * K), K.T @ (D[:, None] * (V - K @ W_0)))
        assert float((solution.weight - exact).norm() / (exact - W_0).norm()) < 10 * FLOAT32
        assert editor.layout.edited[layer].holds(solution.weight)


def test_unknown_numbers_are_refused(fresh, requests, settings):
    editor = fresh(settings())
    with pytest.raises(RequestError, match="no such edit: 1; 0 edits stand"):
        editor.retract(1)
    editor.edit(requests)
    before = edited_weights(editor)
    for act in (
        lambda: editor.retract([1, 9]),
        lambda: editor.retract([]),
        lambda: editor.amend(9, requests[0]),
    ):
        with pytest.raises(RequestError, match=r"no such edit.*4 edits stand, numbers 1 to 4"):
            act()
    with pytest.raises(RequestError, match="'subject'"):
        editor.amend(1, {"prompt": "x", "target_new": "y"})
    assert same(edited_weights(editor), before)


def test_an_amendment_that_fails_leaves_the_old_edit(fresh, requests, settings, tmp_path, monkeypatch):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests)
    before, on_disk = edited_weights(editor), content(tmp_path)
    covariance = editor.state.layers[1].covariance()
    with monkeypatch.context() as patch:
        patch.setattr(
            "easyedit_rls.editors.rls.optimize_values", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            editor.amend(2, {**requests[1], "target_new": "bread"})
    assert same(edited_weights(editor), before)
    assert content(tmp_path) == on_disk
    assert torch.equal(editor.state.layers[1].covariance(), covariance)
    assert editor.amend(2, {**requests[1], "target_new": "bread"}).n_edits == 4


def test_importance_decides_how_well_an_edit_is_met(fresh, requests, settings):
    misses = []
    for importance in (0.1, 1.0, 10.0):
        report = fresh(settings()).edit({**requests[0], "importance": importance})
        misses.append(report.facts[0].miss)
    assert misses == sorted(misses, reverse=True)


def test_drift_is_mended_from_the_ledger(fresh, requests, settings, tmp_path, caplog):
    hp = settings()
    editor = fresh(hp, tmp_path)
    editor.edit(requests[:2])
    spoil(editor.state.layers[2])
    editor.edit(requests[2:])
    assert "Layer 2 has drifted" in caplog.text
    assert max(solution.drift() for solution in editor.state.layers.values()) < FLOAT32
    for layer, solution in editor.state.layers.items():
        exact = rebuilt(read_prior(latest(tmp_path), layer).beginning, solution, editor.state.history, layer)
        assert float((solution.weight - exact.weight).norm() / exact.weight.norm()) < FLOAT32
    editor.close()
    assert same_state(fresh(hp, tmp_path), editor)
    replayed = read_moment(latest(tmp_path), from_start=True)
    assert (
        torch.equal(replayed.solutions[2].weight, editor.state.layers[2].weight)
        or replayed.solutions[2].drift() < FLOAT32
    )


def test_without_a_ledger_drift_is_mended_too(fresh, requests, settings, caplog):
    one, other = fresh(settings()), fresh(settings())
    for editor in (one, other):
        editor.edit(requests[:2])
    spoil(one.state.layers[2])
    for editor in (one, other):
        editor.edit(requests[2:])
    assert "Layer 2 has drifted" in caplog.text
    assert one.state.layers[2].weight.dtype == torch.float64
    for layer, solution in one.state.layers.items():
        assert solution.drift() < FLOAT32
        torch.testing.assert_close(solution.weight.float(), other.state.layers[layer].weight, **WEIGHTS)


def stream_in_bfloat16(tok, requests, n_batches):
    """An edited model with the keys and targets of its stream, a batch a row."""
    hp = tiny_settings("llama", v_num_grad_steps=2, on_conflict="keep", mom2_update_weight=200.0)
    editor = RLSEditor(FAMILIES["llama"]().to(torch.bfloat16), tok, hp)
    editor.prepare()
    priors = {
        layer: (solution.covariance(), solution.weight.clone())
        for layer, solution in editor.state.layers.items()
    }
    targets = ["people", "water", "well", "slow leaves"]
    for i in range(n_batches):
        editor.edit({**requests[i % 4], "target_new": targets[(i // 4) % 4]})
    return editor, priors


def worst_ulps(editor, priors, layer):
    """Distance of the model's weight from the float64 batch solution's rounding, in units of the last place
    of bfloat16.

    Entries near zero are judged by the last place of 1e-4 of the largest: they are what float32 leaves of
    larger ones.
    """
    K, V, _ = (t.double() for t in editor.state.history.tensors(editor.state.history.live, [layer])[layer])
    C_0, W_0 = (tensor.double() for tensor in priors[layer])
    exact = (
        (W_0 + torch.linalg.solve(torch.linalg.inv(C_0) + K.T @ K, K.T @ (V - K @ W_0)))
        .to(torch.bfloat16)
        .double()
    )
    ulp = exact.abs().clamp(min=1e-4 * float(exact.abs().max())).log2().floor().exp2() * 2**-7
    return float(((editor.layout.edited[layer].oriented().double() - exact).abs() / ulp).max())


def test_five_hundred_batches_in_bfloat16_are_the_rounding_of_the_float32_run(tok, requests):
    editor, priors = stream_in_bfloat16(tok, requests, 500)
    for layer, weight in editor.layout.edited.items():
        C_0, W_0 = priors[layer]
        alone = RecursiveLeastSquares.assemble(
            C_0.clone(), W_0.clone(), torch.linalg.inv(C_0.double()), None, 0, "the float32 run"
        )
        for edit_id in editor.state.history.live:
            alone = alone.update(*editor.state.history.tensors([edit_id], [layer])[layer])
        assert torch.equal(weight.oriented(), alone.weight.to(torch.bfloat16))
        assert worst_ulps(editor, priors, layer) <= 1


def test_without_a_master_rounding_piles_up(tok, requests, monkeypatch):
    """The twin: as if each batch began from the rounded weights."""
    real = RecursiveLeastSquares.update

    def update(state, *args, **how):
        new = real(state, *args, **how)
        new.weight.copy_(new.weight.to(torch.bfloat16))
        return new

    monkeypatch.setattr(RecursiveLeastSquares, "update", update)
    monkeypatch.setattr(
        "easyedit_rls.ledger.change.WEIGHT_TOLERANCE", math.inf
    )  # it would be seen, and mended
    editor, priors = stream_in_bfloat16(tok, requests, 100)
    assert all(worst_ulps(editor, priors, layer) > 2 for layer in priors)
