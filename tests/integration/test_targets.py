"""Target outputs: each rule is its equation, and the editor gives the solver what a plain pass with z put in
says.
"""

from dataclasses import replace

import pytest
import torch

from easyedit_rls import RLSEditHyperParams, RLSEditor
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.facts.keys import locate_facts
from easyedit_rls.facts.targets import first_layer, published, residual
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests import zoo
from tests.reference import hidden_at, plain_value
from tests.tolerances import VALUES

PLAIN = {"mom2_adjustment": False, "lambda_reg": 0.1, "max_deviation": "off", "context_templates": []}


def test_each_rule_is_its_equation():
    """Behind a projection whose output is doubled on its way."""
    generator = torch.Generator().manual_seed(0)
    output, missing = torch.randn(2, 3, 4, generator=generator)
    for layers_left in (1, 2, 5):
        step = missing / layers_left / 2
        for rule, wanted in (
            (residual, output + step),
            (published, output + step - output / layers_left),
            (first_layer, output + missing / 2),
        ):
            found = rule(output, missing, layers_left, lambda change: change / 2)
            torch.testing.assert_close(found, wanted)
    at_last = published(output, missing, 1, lambda change: change)
    torch.testing.assert_close(at_last, missing)  # V = z − h


def states_with(model, layout, row, z):
    """Hidden states of the edited layers at a row's place when the first of them passes on z; one text, no
    cache.
    """
    first = layout.layers[min(layout.edited)]

    def put(module, args, out):
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[0, row.place] = z
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = first.register_forward_hook(put)
    try:
        return [hidden_at(model, layout.layers[layer], row.ids, row.place) for layer in layout.edited]
    finally:
        handle.remove()


@pytest.mark.parametrize("keys", ["mean", "each"])
def test_first_layers_targets_equal_the_plain_path(model, tok, requests, settings, keys, monkeypatch):
    hp = settings(targets="first_layer", layers=[0, 1, 2], keys=keys)
    editor = RLSEditor(model, tok, hp)
    layout = editor.layout
    facts = locate_facts(tok, parse_requests(requests), hp.context_templates)
    at_first = replace(layout, n_lower=1)
    goals = [
        states_with(model, layout, fact.rows[0], plain_value(model, at_first, fact, hp)[0]) for fact in facts
    ]
    untouched = [
        [hidden_at(model, layout.layers[n], fact.rows[0].ids, fact.rows[0].place) for n in hp.layers]
        for fact in facts
    ]
    real, seen = RecursiveLeastSquares.update, []

    def update(state, K, V, importance, **how):
        layer = hp.layers[len(seen)]
        now = [hidden_at(model, layout.layers[layer], fact.rows[0].ids, fact.rows[0].place) for fact in facts]
        step = V - K.to(state.weight) @ state.weight
        seen.append((step if keys == "mean" else step.mean(1), torch.stack(now)))
        return real(state, K, V, importance, **how)

    monkeypatch.setattr(RecursiveLeastSquares, "update", update)
    report = editor.edit(requests)
    for i, (step, now) in enumerate(seen):
        z = torch.stack([goal[i] for goal in goals])
        assert float((step - (z - now)).norm() / (z - now).norm()) < VALUES
        if i:  # the twin: what the layers below have written is counted
            before = torch.stack([states[i] for states in untouched])
            assert float((step - (z - before)).norm() / (z - before).norm()) > 0.1
    assert min(fact.value_change for fact in report.facts) > 0.05


def test_one_layer_is_first_and_last(family, tok, requests, settings):
    from tests.conftest import FAMILIES

    weights = []
    for targets in ("residual", "first_layer", "published"):
        editor = RLSEditor(FAMILIES[family](), tok, settings(targets=targets, layers=[2]))
        editor.edit(requests)
        weights.append(editor.layout.edited[2].read())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
    assert float((weights[0] - weights[2]).abs().max()) > 0.01


@pytest.mark.parametrize("targets", ["published", "first_layer"])
@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_targets_for_hidden_states_are_refused_for_values_at_the_outputs(name, targets, tok, requests):
    model = zoo.make(name)
    place = {"value_at": "output"} if name == "llama" else {}
    hp = RLSEditHyperParams.for_model(model, layers=[1, 2], targets=targets, **PLAIN, **place)
    with pytest.raises(HyperParamsError, match=rf"targets: {targets}.*value_at: hidden"):
        RLSEditor(model, tok, hp).edit(requests)


def test_first_layer_goes_through_a_norm(tok, requests):
    """Values at the hidden state of a model with norms, because they are asked for."""
    model = zoo.make("gemma2")
    hp = RLSEditHyperParams.for_model(
        model, layers=[0, 1, 2], targets="first_layer", value_at="hidden", **PLAIN
    )
    report = RLSEditor(model, tok, hp).edit(requests)
    assert max(fact.miss for fact in report.facts) < 1
