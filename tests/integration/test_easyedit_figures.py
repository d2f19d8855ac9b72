"""EasyEdit's figures by our batched pass, against its rule spelled out one prompt at a time. (tests/host has
the real one.)
"""

import pytest
import torch

from easyedit_rls import RequestError
from easyedit_rls.evaluation import add_locality, edit_quality

RECORDS = [
    {"prompt": "The bread is made of", "target_new": "water and air",
        "rephrase_prompt": "Bakers make bread from",
        "locality": {"neighborhood": {"prompt": ["Cake is made of", "Pasta needs the"],
        "ground_truth": ["flour", "salt and eggs"]}},
        "portability": {"one_hop": {"prompt": "Who eats bread eats", "ground_truth": "water"}}},
    {"prompt": ["The slow river is", "The river"], "target_new": ["warm and wide", "goes"]},
]  # fmt: skip


def plain(model, tok, prompt, answer):
    """Tokens of the answer, and what the model says in their places."""
    ids, n = tok(f"{prompt} {answer}")["input_ids"], len(tok(prompt)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    return ids[n:], logits.argmax(1)[n - 1 : -1].tolist()


def accuracy(model, tok, prompt, answer):
    wanted, said = plain(model, tok, prompt, answer)
    return sum(a == b for a, b in zip(wanted, said)) / len(wanted)


def with_hits(model, tok, records):
    """The records with answers that begin as the model's own, so that figures aren't all 0."""
    wanted, said = plain(model, tok, "The bread is made of", "water and air")
    answer = tok.decode([said[0], *wanted[1:]])
    return [{**records[0], "target_new": answer.strip()}, *records[1:]]


def test_figures_equal_the_rule(model, tok):
    records = with_hits(model, tok, RECORDS)
    first, second = edit_quality(model, tok, records, batch_tokens=16)
    new = records[0]["target_new"]
    assert first["rewrite_acc"] == [accuracy(model, tok, "The bread is made of", new)]
    assert first["rephrase_acc"] == [accuracy(model, tok, "Bakers make bread from", new)]
    locality = records[0]["locality"]["neighborhood"]
    outputs = [plain(model, tok, p, a)[1] for p, a in zip(locality["prompt"], locality["ground_truth"])]
    assert first["locality"] == {"neighborhood_output": outputs}
    assert first["portability"] == {"one_hop_acc": [accuracy(model, tok, "Who eats bread eats", "water")]}
    assert second["rewrite_acc"] == [
        accuracy(model, tok, p, a) for p, a in zip(RECORDS[1]["prompt"], RECORDS[1]["target_new"])
    ]
    assert (second["locality"], second["portability"], "rephrase_acc" in second) == ({}, {}, False)


def test_locality_is_agreement_with_before(model, tok):
    before, after = (edit_quality(model, tok, RECORDS) for _ in range(2))
    add_locality(before, after)
    assert after[0]["locality"]["neighborhood_acc"] == [1.0, 1.0]
    after = edit_quality(model, tok, RECORDS)
    after[0]["locality"]["neighborhood_output"][1][0] += 1
    add_locality(before, after)
    n = len(before[0]["locality"]["neighborhood_output"][1])
    assert after[0]["locality"]["neighborhood_acc"] == [1.0, 1 - 1 / n]
    assert "neighborhood_acc" not in before[0]["locality"]


@pytest.mark.parametrize(("change", "field"), [
    ({"prompt": None}, "prompt"),
    ({"target_new": 3}, "target_new"),
    ({"target_new": ["a", "b"]}, "target_new"),
    ({"locality": {"near": "text"}}, "locality.near"),
    ({"portability": {"hop": {"prompt": "x"}}}, "portability.hop.ground_truth"),
])  # fmt: skip
def test_faults_are_named(model, tok, change, field):
    with pytest.raises(RequestError, match="1") as caught:
        edit_quality(model, tok, [RECORDS[0], {**RECORDS[0], **change}])
    assert (caught.value.index, caught.value.field) == (1, field)


def test_an_answer_without_a_token_is_named(model, tok):
    with pytest.raises(RequestError, match="no token of its own") as caught:
        edit_quality(model, tok, [RECORDS[0], {**RECORDS[0], "target_new": ""}])
    assert caught.value.index == 1
