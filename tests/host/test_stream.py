"""Thirty real facts through `batch_edit` on the real model, all scored again at the end by EasyEdit itself."""

import json

import pytest

from tests.conftest import REPOSITORY

PARAREL = REPOSITORY.parent / "shared" / "data" / "pararel_dev.json"
FIRST, COUNT, BATCH = 2000, 30, 10


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def test_thirty_edits_are_kept(easyeditor, model_folder):
    from easyeditor.editors.editor import finalize_locality_metrics

    if not PARAREL.is_file():
        pytest.skip(f"no records at {PARAREL}")
    if not (model_folder / "smollm2-llama" / "config.json").is_file():
        pytest.skip("no SmolLM2: run `make test`, which sets it up, or set EASYEDIT_RLS_TEST_MODEL")
    hp = easyeditor.RLSEditHyperParams.from_hparams("smollm2-135m")
    hp.model_name, hp.batch_size = "smollm2-llama", BATCH
    records = json.loads(PARAREL.read_text(encoding="utf-8"))[FIRST : FIRST + COUNT]
    facts = [record["requested_rewrite"] for record in records]
    editor = easyeditor.BaseEditor.from_hparams(hp)
    metrics, model, _ = editor.batch_edit(
        prompts=[fact["prompt"].replace("{}", fact["subject"]) for fact in facts],
        subject=[fact["subject"] for fact in facts],
        target_new=[fact["target_new"]["str"] for fact in facts],
        ground_truth=[fact["target_true"]["str"] for fact in facts],
        rephrase_prompts=[record["paraphrase_prompts"][0] for record in records],
        locality_inputs={
            "neighborhood": {
                "prompt": [record["neighborhood_prompts"][0] for record in records],
                "ground_truth": [fact["target_true"]["str"] for fact in facts],
            }
        },
        sequential_edit=True,
        verbose=False,
    )
    for metric in metrics:
        request = metric["requested_rewrite"]
        metric["post"] = easyeditor.compute_edit_quality(model, hp.model_name, hp, editor.tok, request, hp.device)
        finalize_locality_metrics(metric, request, hp, hp.model_name)
    scores = {
        "rewrite_acc": mean(mean(m["post"]["rewrite_acc"]) for m in metrics),
        "rephrase_acc": mean(mean(m["post"]["rephrase_acc"]) for m in metrics),
        "locality": mean(mean(m["post"]["locality"]["neighborhood_acc"]) for m in metrics),
    }
    assert scores["rewrite_acc"] >= 0.97, scores
    assert scores["rephrase_acc"] >= 0.90, scores
    assert scores["locality"] >= 0.95, scores
