"""Chats and Chinese facts on Qwen2.5-Coder-0.5B-Instruct: what is reported is what the model says behind the
real prompt; minutes long.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate
from tests.integration.test_texts import CHAT_FACTS, said_behind

CHINESE = [
    ("西游记的作者是", "西游记", "小明"),
    ("自由女神像位于", "自由女神像", "伦敦"),
    ("法国的首都是", "法国", "里昂"),  # begins with its subject, one token
    ("埃菲尔铁塔位于", "埃菲尔铁塔", "罗马"),
    ("日本的货币是", "日本", "法郎"),
    ("巴西的官方语言是", "巴西", "芬兰语"),
]


@pytest.fixture
def edited():
    """Edit facts into a fresh model with the settings that are made for it."""
    folder = os.environ.get("EASYEDIT_RLS_QWEN")
    if not folder or not (Path(folder) / "config.json").is_file():
        pytest.skip("no Qwen2.5-Coder-0.5B-Instruct: set EASYEDIT_RLS_QWEN to its folder")

    def edit(facts):
        model, tok = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            AutoTokenizer.from_pretrained(folder),
        )
        RLSEditor(model, tok, RLSEditHyperParams.for_model(model), show_progress=False).edit(facts)
        return (
            model,
            tok,
            [record.rewrite_accuracy for record in evaluate(model, tok, facts, show_progress=False).records],
        )

    return edit


@pytest.mark.slow
def test_edited_chats_are_said_behind_the_real_prompt(edited):
    facts = [
        {"messages": [{"role": "user", "content": text}], "subject": subject, "target_new": new}
        for text, subject, new in CHAT_FACTS
    ]
    model, tok, reported = edited(facts)
    said = said_behind(model, tok, facts)
    assert sum(said) >= 5
    assert reported == [float(hit) for hit in said]


@pytest.mark.slow
def test_edited_chinese_facts_are_said_without_a_space(edited):
    facts = [{"prompt": prompt, "subject": subject, "target_new": new} for prompt, subject, new in CHINESE]
    model, tok, reported = edited(facts)
    said = []
    for fact in facts:
        given = tok(fact["prompt"], return_tensors="pt")
        out = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)
        said.append(tok.decode(out[0, given["input_ids"].shape[1] :]).startswith(fact["target_new"]))
    assert sum(said) >= 5
    assert reported == [float(hit) for hit in said]
