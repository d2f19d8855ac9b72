"""Sixty facts in, twenty taken back, on the real model with the shipped settings; minutes long."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate
from easyedit_rls.data.packaged import packaged_text
from tests.conftest import SMOLLM2


@pytest.mark.slow
def test_what_is_retracted_goes_back_and_the_others_stay(smollm2, tmp_path):
    model, tok = smollm2
    facts = json.loads(packaged_text("demo_facts.json"))[:60]
    gone, kept = facts[::3], [fact for i, fact in enumerate(facts) if i % 3]
    unedited = [record.efficacy for record in evaluate(model, tok, gone).records]
    hparams = RLSEditHyperParams.from_hparams("smollm2-135m")
    with RLSEditor(model, tok, hparams, state_dir=tmp_path) as editor:
        numbers = [
            fact.edit_id
            for start in range(0, 60, 20)
            for fact in editor.edit(facts[start : start + 20]).facts
        ]
        edited = [record.efficacy for record in evaluate(model, tok, gone).records]
        editor.retract(numbers[::3])
    back = [record.efficacy for record in evaluate(model, tok, gone).records]
    assert sum(a == b for a, b in zip(unedited, edited)) < 10  # the twin: the edits did change the answers
    assert sum(a == b for a, b in zip(unedited, back)) >= 18
    assert evaluate(model, tok, gone).rewrite_accuracy <= 0.1
    assert evaluate(model, tok, kept).rewrite_accuracy >= 0.90

    fresh = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    with RLSEditor(fresh, tok, hparams, state_dir=tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters()))
