"""The real model: a few facts, so that what tiny random models can't show is seen in every run of the
tests.
"""

import copy
import json

import pytest
import torch

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, perplexity
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.facts.keys import locate_facts
from easyedit_rls.facts.values import optimize_values
from easyedit_rls.model.hooks import undisturbed
from easyedit_rls.model.layout import find_layout
from tests.reference import plain_value
from tests.tolerances import VALUES


@pytest.fixture(scope="module")
def facts():
    records = json.loads(packaged_text("demo_facts.json"))
    return [records[i] for i in (2, 10, 32, 42, 48, 57)]


@pytest.fixture(scope="module")
def hparams(tmp_path_factory, demo_text):
    """The shipped settings, with a small text file for the moments: sampling text from the model would take
    minutes here.
    """
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(demo_text)
    settings = RLSEditHyperParams.from_hparams("smollm2-135m").to_dict()
    return RLSEditHyperParams.from_dict({**settings, "mom2_dataset": str(path), "lambda_reg": 0.3})


def test_it_knows_the_capital_of_france(smollm2):
    model, tok = smollm2
    evaluation = evaluate(
        model, tok, {"prompt": "The capital of France is", "subject": "France", "target_new": "Paris"}
    )
    assert evaluation.rewrite_accuracy == 1


def test_values_equal_the_plain_path(smollm2, hparams, facts):
    model, tok = smollm2
    settings = RLSEditHyperParams.from_dict({**hparams.to_dict(), "v_num_grad_steps": 6})
    layout = find_layout(model, settings)
    located = locate_facts(tok, parse_requests(facts[:2]), ["It was a fine day. "])
    with undisturbed(model):
        values = optimize_values(model, layout, located, settings)
        for i, fact in enumerate(located):
            with torch.enable_grad():
                z, loss, _, steps = plain_value(model, layout, fact, settings)
            assert int(values.steps[i]) == steps
            assert float((values.z[i] - z).norm() / (z - values.h[i]).norm()) < VALUES
            assert float(values.loss[i]) == pytest.approx(loss, rel=VALUES)


def test_two_batches_land_and_the_first_is_kept(smollm2, hparams, facts, demo_text):
    model, tok = copy.deepcopy(smollm2[0]), smollm2[1]
    before, plain = evaluate(model, tok, facts), perplexity(model, tok, demo_text, max_tokens=1024)
    assert before.rewrite_accuracy <= 0.2
    editor = RLSEditor(model, tok, hparams)
    editor.edit(facts[:3])
    editor.edit(facts[3:])
    after = evaluate(model, tok, facts)
    assert after.efficacy == 1
    assert after.rewrite_accuracy >= 5 / 6
    assert evaluate(model, tok, facts[:3]).rewrite_accuracy >= 2 / 3
    assert after.generalization > before.generalization + 0.3
    assert perplexity(model, tok, demo_text, max_tokens=1024) < 1.05 * plain
