"""EasyEdit's figures by our batched pass are those of its own `compute_edit_quality`, number for number."""

import pytest

from easyedit_rls.evaluation import add_locality, edit_quality
from tests.host.conftest import demo_records

N_RECORDS = 50


def of_easyedit(record: dict) -> dict:
    """A record in EasyEdit's shape.

    Each neighbor and each further paraphrase has a name of its own: prompts of one name run there left-padded
    together, which shifts GPT-2's positions.
    """
    fact = record["requested_rewrite"]
    true = fact["target_true"]["str"]
    hops = [fact["prompt"].format(fact["subject"]), *record["paraphrase_prompts"][1:]]
    return {
        "prompt": fact["prompt"].format(fact["subject"]),
        "target_new": fact["target_new"]["str"],
        "ground_truth": true,
        "rephrase_prompt": record["paraphrase_prompts"][0],
        "locality": {
            f"near_{i}": {"prompt": prompt, "ground_truth": true}
            for i, prompt in enumerate(record["neighborhood_prompts"])
        },
        "portability": {
            f"hop_{i}": {"prompt": prompt, "ground_truth": true} for i, prompt in enumerate(hops)
        },
    }


def test_figures_equal_compute_edit_quality(easyeditor, hparams, name):
    """The tiny models never give the answer asked for; so every second record asks for what the model says
    anyway.
    """
    hp = hparams(max_length=40)
    editor = easyeditor.BaseEditor.from_hparams(hp)
    records = [of_easyedit(record) for record in demo_records()[:N_RECORDS]]
    said = edit_quality(editor.model, editor.tok, records)
    for record, quality in list(zip(records, said))[::2]:
        answer = editor.tok.decode(
            quality["locality"]["near_0"][0] if "near_0" in quality["locality"] else [5]
        ).strip()
        record["target_new"] = answer or record["target_new"]
    ours = edit_quality(editor.model, editor.tok, records)
    theirs = [
        easyeditor.compute_edit_quality(editor.model, hp.model_name, hp, editor.tok, record, hp.device)
        for record in records
    ]
    for one, other in zip(ours, theirs):
        assert one["rewrite_acc"] == pytest.approx(other["rewrite_acc"])
        assert one["rephrase_acc"] == pytest.approx(other["rephrase_acc"])
        assert one["locality"] == {
            key: value for key, value in other["locality"].items() if key.endswith("_output")
        }
        assert one["portability"].keys() == {key for key in other["portability"] if key.endswith("_acc")}
        for key, value in one["portability"].items():
            assert value == pytest.approx(other["portability"][key])
    if name == "smollm2-llama":
        assert any(one["rewrite_acc"][0] > 0 for one in ours)


def test_locality_equals_the_hosts(easyeditor, hparams):
    from easyeditor.editors.editor import finalize_locality_metrics

    hp = hparams(max_length=40)
    editor = easyeditor.BaseEditor.from_hparams(hp)
    records = [of_easyedit(record) for record in demo_records()[:10]]
    before = edit_quality(editor.model, editor.tok, records)
    for weight in editor.model.parameters():
        weight.data *= 1.05
    after = edit_quality(editor.model, editor.tok, records)
    add_locality(before, after)
    for record, old, new in zip(records, before, after):
        metric = {
            "pre": {"locality": old["locality"]},
            "post": {"locality": {k: v for k, v in new["locality"].items() if "_output" in k}},
        }
        finalize_locality_metrics(metric, record, hp, hp.model_name)
        for key in record["locality"]:
            assert new["locality"][f"{key}_acc"] == pytest.approx(metric["post"]["locality"][f"{key}_acc"])
