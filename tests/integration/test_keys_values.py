"""Keys and values: batched equals one by one equals the plain path; padding makes no difference."""

from dataclasses import replace

import pytest
import torch

import easyedit_rls.facts.values
from easyedit_rls import RLSEditor
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.errors import RequestError
from easyedit_rls.facts.keys import LayerWalk, collect_keys, locate_facts, value_states
from easyedit_rls.facts.suffix import Suffixes
from easyedit_rls.facts.values import losses_at, optimize_values
from easyedit_rls.model.hooks import skip_layers, undisturbed
from easyedit_rls.model.layout import find_layout
from tests.conftest import FAMILIES
from tests.reference import hidden_at, plain_key, plain_value
from tests.tolerances import BATCHES, BFLOAT16, LOGITS, NEARLY_ZERO, PADDING, VALUES


@pytest.fixture
def located(model, tok, requests, settings):
    """Facts that include one whose every text begins with the subject's last token (no cached beginning at
    all).
    """
    hp = settings(statements=["{}:", "Who? {},"])
    return find_layout(model, hp), locate_facts(
        tok, parse_requests(requests), hp.context_templates, hp.statements
    )


@pytest.fixture
def n_rows(monkeypatch):
    """How many rows each step has run so far."""
    found = []
    forward = Suffixes.forward

    def counted(self, plan, delta):
        found.append(sum(len(one.places) for one in plan.passes))
        return forward(self, plan, delta)

    monkeypatch.setattr(Suffixes, "forward", counted)
    return found


@pytest.mark.parametrize("batch_tokens", [16, 10_000])
@pytest.mark.parametrize("layer", [1, 2])
def test_batched_keys_equal_the_plain_path(model, located, layer, batch_tokens):
    layout, facts = located
    keys = collect_keys(model, layout, facts, layer, batch_tokens)
    for key, fact in zip(keys, facts):
        torch.testing.assert_close(key, plain_key(model, layout, fact, layer), rtol=0, atol=PADDING)
    assert float((keys[0] - keys[1]).norm()) > 0.1  # the twin: unlike facts have unlike keys


def test_templates_share_half_of_the_key(model, located):
    layout, facts = located
    (key,) = collect_keys(model, layout, facts[:1], 1, 1000)
    parts = [
        hidden_at(model, layout.edited[1].module, row.ids, row.place, is_input=True) for row in facts[0].rows
    ]
    torch.testing.assert_close(key, 0.5 * parts[0] + 0.25 * parts[1] + 0.25 * parts[2], rtol=0, atol=PADDING)


def test_value_states_are_those_of_the_bare_prompt(model, located):
    layout, facts = located
    states = value_states(model, layout, facts, 10_000)
    for state, fact in zip(states, facts):
        plain = hidden_at(model, layout.value_layer, fact.rows[0].ids, fact.rows[0].place)
        torch.testing.assert_close(state, plain, rtol=0, atol=PADDING)


@pytest.mark.parametrize("early_stopping", ["off", "argmax", "loss"])
def test_batched_values_equal_the_plain_path(model, located, settings, early_stopping):
    layout, facts = located
    hp = settings(early_stopping=early_stopping)
    with undisturbed(model):
        values = optimize_values(model, layout, facts, hp)
    for i, fact in enumerate(facts):
        z, loss, nll, steps = plain_value(model, layout, fact, hp)
        assert int(values.steps[i]) == steps
        assert float((values.z[i] - z).norm() / (z - values.h[i]).norm().clamp(min=1e-6)) < VALUES
        assert float(values.loss[i]) == pytest.approx(loss, rel=VALUES)
        assert float(values.nll[i]) == pytest.approx(nll, rel=VALUES, abs=NEARLY_ZERO)
    if early_stopping == "argmax":
        assert len(set(values.steps.tolist())) > 1  # each fact stops by itself
        assert (
            sorted(values.steps.tolist())[2] < hp.v_num_grad_steps - 1
        )  # the three that random attention can reach
    if early_stopping == "off":
        assert set(values.steps.tolist()) == {hp.v_num_grad_steps - 1}


@pytest.mark.parametrize("early_stopping", ["off", "argmax"])
def test_settled_texts_keep_their_gradient_for_some_steps(model, located, settings, early_stopping, n_rows):
    layout, facts = located
    hp = settings(early_stopping=early_stopping, settled_nll=5.0, settled_every=4, v_momentum=0.5)
    with undisturbed(model):
        values = optimize_values(model, layout, facts, hp)
        lazy, n_rows[:] = sum(n_rows), []
        full = optimize_values(
            model, layout, facts, settings(early_stopping=early_stopping, v_momentum=0.5, settled_nll=1e-9)
        )
    for i, fact in enumerate(facts):
        z, loss, nll, steps = plain_value(model, layout, fact, hp)
        assert int(values.steps[i]) == steps
        assert float((values.z[i] - z).norm() / (z - values.h[i]).norm().clamp(min=1e-6)) < VALUES
        assert float(values.loss[i]) == pytest.approx(loss, rel=VALUES)  # at the end every text has run
        assert float(values.nll[i]) == pytest.approx(nll, rel=VALUES, abs=NEARLY_ZERO)
    if early_stopping == "off":
        assert lazy < 0.9 * sum(n_rows)
    assert not torch.equal(values.z, full.z)


def test_a_copy_in_bfloat16_finds_values_as_good(model, located, settings, monkeypatch):
    layout, facts = located
    hp, dtypes = settings(early_stopping="off"), set()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    forward = Suffixes.forward

    def noting(self, plan, delta):
        dtypes.add((found := forward(self, plan, delta)).dtype)
        return found

    with undisturbed(model):
        plain = optimize_values(model, layout, facts, hp)
        with monkeypatch.context() as patch:
            patch.setattr(Suffixes, "forward", noting)
            low = optimize_values(model, layout, facts, replace(hp, v_dtype="bfloat16"))
        assert dtypes == {torch.bfloat16}
        losses = losses_at(model, layout, facts, hp, low.delta)
        assert torch.equal(low.h, value_states(model, layout, facts, hp.batch_tokens))  # not rounded
    assert low.z.dtype == torch.float32
    torch.testing.assert_close(losses, plain.loss, rtol=BFLOAT16, atol=BFLOAT16)
    torch.testing.assert_close(low.loss, losses, rtol=BFLOAT16, atol=BFLOAT16)
    assert not torch.equal(low.z, plain.z)
    assert all(
        torch.equal(weight, before[name]) and weight.dtype == torch.float32
        for name, weight in model.state_dict().items()
    )


def test_a_model_of_that_type_already_is_not_copied(family, tok, requests, settings, monkeypatch):
    hp, model = settings(v_dtype="bfloat16", v_num_grad_steps=2), FAMILIES[family]().bfloat16()
    monkeypatch.setattr(easyedit_rls.facts.values, "cast_copy", None)
    facts = locate_facts(tok, parse_requests(requests), hp.context_templates, hp.statements)
    with undisturbed(model):
        assert optimize_values(model, find_layout(model, hp), facts, hp).z.isfinite().all()


def test_losses_at_a_value_are_those_it_was_found_with(model, located, settings):
    layout, facts = located
    hp = settings(early_stopping="argmax")
    with undisturbed(model):
        values = optimize_values(model, layout, facts, hp)
        torch.testing.assert_close(
            losses_at(model, layout, facts, hp, values.delta), values.loss, rtol=VALUES, atol=VALUES
        )
        assert (losses_at(model, layout, facts, hp, torch.zeros_like(values.delta)) > values.loss).all()


def test_an_editor_takes_its_statements_along(family, tok, requests, settings):
    nlls = []
    for share in (0.0, 0.5):
        model = FAMILIES[family]()
        report = RLSEditor(model, tok, settings(statements=["{}:"], statement_share=share)).edit(requests[:2])
        nlls.append([fact.nll for fact in report.facts])
    assert nlls[0] != nlls[1]


def one_look(hparams):
    """Settings with one evaluation of the loss and no step, which users may not ask for."""
    hparams.v_num_grad_steps = 1
    return hparams


def test_the_essence_prompts_output_is_read_off_a_text_that_begins_alike(model, located, settings, n_rows):
    """That this changes no value is held by the plain path above, which runs it by itself."""
    layout, facts = located
    without = [replace(fact, statements=()) for fact in facts]
    begins_bare = [
        any(row.ids[: row.place + 1] == fact.kl_prompt.ids[: row.place + 1] for row in fact.rows)
        for fact in facts
    ]
    assert set(begins_bare) == {True, False}
    with undisturbed(model):
        optimize_values(model, layout, facts, one_look(settings()))
        optimize_values(model, layout, without, one_look(settings()))
    prompts = sum(len(fact.rows) for fact in facts)
    assert n_rows == [prompts + 2 * len(facts), prompts + begins_bare.count(False)]


def test_facts_of_any_length_share_their_passes(model, tok, requests, settings, n_rows):
    """Only memory divides a batch: rows of like length find each other across all of its facts."""
    long = [
        {**request, "prompt": "Those who had asked about it for long were told that " + request["prompt"]}
        for request in requests
    ]
    for few in ({}, {"batch_tokens": 300}):
        hp = one_look(settings(**few))
        facts = locate_facts(
            tok, parse_requests(2 * requests + 2 * long), hp.context_templates, hp.statements
        )
        n_rows.append(0)
        with undisturbed(model):
            optimize_values(model, find_layout(model, hp), facts, hp)
    whole, divided = n_rows[1 : n_rows.index(0, 1)], n_rows[n_rows.index(0, 1) + 1 :]
    assert len(whole) == 1
    assert len(divided) > 1
    assert sum(divided) == sum(whole)


def test_rows_that_run_again_are_not_prepared_again(model, located, settings, n_rows, monkeypatch):
    layout, facts = located
    plans = []
    plan = Suffixes.plan
    monkeypatch.setattr(
        Suffixes, "plan", lambda self, chosen: plans.append(list(chosen)) or plan(self, chosen)
    )
    with undisturbed(model):
        optimize_values(model, layout, facts, settings(early_stopping="off", v_num_grad_steps=6))
        assert (len(plans), len(n_rows)) == (1, 6)
        values = optimize_values(model, layout, facts, settings(early_stopping="argmax"))
    assert len(plans) - 1 == len(
        set(values.steps.tolist())
    )  # one for each set of facts that are still under way


def test_one_step_goes_down_the_plain_gradient(model, located, settings):
    layout, facts = located
    hp = settings(values="gradient", gradient_step=0.3)
    with undisturbed(model):
        values = optimize_values(model, layout, facts, hp)
    delta = values.z - values.h
    torch.testing.assert_close(delta.norm(dim=1), 0.3 * values.h.norm(dim=1))
    for i, fact in enumerate(facts):
        # one Adam step of the plain path goes where the gradient's signs point
        z, *_ = plain_value(model, layout, fact,
            settings(early_stopping="off", v_num_grad_steps=2, v_lr=0.01, clamp_norm_factor=1e6))  # fmt: skip
        adam = z - values.h[i]
        clear = delta[i].abs() > 0.01 * delta[i].abs().max()
        assert torch.equal(delta[i][clear].sign(), adam[clear].sign())
        loss = plain_value(model, layout, fact, one_look(settings(early_stopping="off")))[1]
        assert float(values.loss[i]) == pytest.approx(loss, rel=VALUES)


@pytest.mark.parametrize("batch_tokens", [60, 100_000])
def test_a_fact_gets_the_same_value_alone_or_in_any_batch(model, located, settings, batch_tokens):
    layout, facts = located
    hp = settings(batch_tokens=batch_tokens, early_stopping_margin=0.5)
    with undisturbed(model):
        together = optimize_values(model, layout, facts[::-1], hp)
        for i, fact in enumerate(facts):
            alone = optimize_values(model, layout, [fact], hp)
            j = len(facts) - 1 - i
            assert int(alone.steps) == int(together.steps[j])
            assert float((alone.z[0] - together.z[j]).norm() / (alone.z - alone.h).norm()) < VALUES


def test_a_subject_without_anything_before_it(model, tok, settings):
    """No text has a token before its place: there is nothing to cache."""
    hp = settings(context_templates=[])
    layout = find_layout(model, hp)
    facts = locate_facts(tok, parse_requests({"prompt": "I", "subject": "I", "target_new": "bread"}), [])
    assert facts[0].rows[0].place == 0
    with undisturbed(model):
        values = optimize_values(model, layout, facts, hp)
    z, _, _, steps = plain_value(model, layout, facts[0], hp)
    assert int(values.steps) == steps
    assert float((values.z[0] - z).norm() / (z - values.h[0]).norm()) < VALUES


def test_values_stay_in_the_ball(model, located, settings):
    layout, facts = located
    hp = settings(clamp_norm_factor=0.2, early_stopping="off")
    with undisturbed(model):
        values = optimize_values(model, layout, facts, hp)
    ratio = (values.z - values.h).norm(dim=1) / values.h.norm(dim=1)
    assert float(ratio.max()) <= 0.2 * (1 + 1e-5)
    assert float(ratio.max()) > 0.19


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_tokenizers_padding_side_makes_no_difference(model, tok, requests, settings, side, monkeypatch):
    hp = settings()
    layout = find_layout(model, hp)
    expected = locate_facts(tok, parse_requests(requests), hp.context_templates)
    monkeypatch.setattr(tok, "padding_side", side)
    assert locate_facts(tok, parse_requests(requests), hp.context_templates) == expected
    keys = collect_keys(model, layout, expected, 1, 10_000)
    with undisturbed(model):
        values = optimize_values(model, layout, expected, hp)
    assert tok.padding_side == side
    monkeypatch.undo()
    assert torch.equal(keys, collect_keys(model, layout, expected, 1, 10_000))
    with undisturbed(model):
        assert torch.equal(values.z, optimize_values(model, layout, expected, hp).z)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_forward_passes_equal_unpadded_ones(model, located, side):
    """Both sides in the model itself, against each text alone."""
    from easyedit_rls.model.batching import pad, run

    _, facts = located
    rows = [fact.rows[0].ids for fact in facts]
    batch = pad(rows, side, torch.device("cpu"))
    with torch.no_grad():
        logits = run(model, batch).logits
        for i, row in enumerate(rows):
            alone = model(torch.tensor([row])).logits[0]
            torch.testing.assert_close(logits[i][batch.mask[i].bool()], alone, rtol=0, atol=LOGITS)


def test_bad_targets_name_their_request(tok, requests):
    with pytest.raises(RequestError, match=r"Request 1, field 'target_new'.*unknown token"):
        locate_facts(tok, parse_requests([requests[0], {**requests[1], "target_new": "<unk>"}]), [])


def test_layers_up_to_the_value_layer_run_once_and_are_left_as_found(model, located, settings):
    layout, facts = located
    hp = settings(early_stopping="off")
    runs = {"below": 0, "above": 0}
    assert len(layout.residuals) == len(layout.edited)  # looked at in passes of their own, once

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    below = next(module for name, module in layout.value_layer.named_modules() if "mlp" in name)
    above = next(module for name, module in layout.loss_layer.named_modules() if "mlp" in name)
    handles = [below.register_forward_hook(count("below")), above.register_forward_hook(count("above"))]
    with undisturbed(model):
        optimize_values(model, layout, facts, hp)
    for handle in handles:
        handle.remove()
    groups = (runs["above"] - runs["below"]) / (
        hp.v_num_grad_steps - 1
    )  # both have the heads; below, tails once, above, every step
    assert groups in {1, 2, 3, 4}
    assert (
        groups < runs["below"] <= 2 * groups + 3
    )  # tails, heads of like length, what heads share, one token for the forms
    assert all("forward" not in layer.__dict__ for layer in layout.lower_layers)


def test_skipped_layers_come_back_after_an_exception(model, located):
    layout, _ = located
    own = layout.lower_layers[0].forward
    layout.lower_layers[0].__dict__["forward"] = own  # as somebody else's wrapper
    with (
        pytest.raises(KeyboardInterrupt),
        skip_layers(layout.lower_layers, [None] * len(layout.lower_layers), torch.zeros(1, 1, 32)),
    ):
        assert layout.lower_layers[1].forward() is not None
        raise KeyboardInterrupt
    assert layout.lower_layers[0].__dict__["forward"] is own
    assert all("forward" not in layer.__dict__ for layer in layout.lower_layers[1:])


def test_a_walk_upward_equals_starting_anew_and_runs_less(model, located, settings):
    """Each layer is changed after its keys were read, as the editor does."""
    layout, facts = located
    runs = []
    handle = next(
        module for name, module in layout.lower_layers[0].named_modules() if "mlp" in name
    ).register_forward_hook(lambda *_: runs.append(1))
    walk, per_layer = LayerWalk(model, layout, facts, 10_000), []
    for layer, weight in layout.edited.items():
        keys, states = walk.advance_to(layer), walk.value_states(layer)
        per_layer.append(len(runs))
        torch.testing.assert_close(keys, collect_keys(model, layout, facts, layer, 10_000), **BATCHES)
        torch.testing.assert_close(states, value_states(model, layout, facts, 10_000), **BATCHES)
        runs.clear()
        with torch.no_grad():
            weight.parameter.mul_(1.3)
    last = max(layout.edited)
    torch.testing.assert_close(walk.value_states(last), value_states(model, layout, facts, 10_000), **BATCHES)
    handle.remove()
    assert per_layer == [
        per_layer[0],
        *[0] * (len(layout.edited) - 1),
    ]  # the lowest layer runs for the first keys only
    assert per_layer[0] <= 5  # two sets of rows in two lengths, and what the rows of one begin with
