"""Metrics against the published formulae, computed one prompt at a time."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

from easyedit_rls import RequestError, evaluate, perplexity
from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.data.requests import Probe
from easyedit_rls.evaluation import scores as scoring
from easyedit_rls.evaluation.scores import score
from tests.tolerances import SCORES

RECORDS = [
    {"case_id": 3, "requested_rewrite": {"prompt": "The {} is made of", "subject": "bread",
        "target_new": {"str": "water"}, "target_true": {"str": "flour"}},
        "paraphrase_prompts": ["Bakers make bread from", "In bread there is"],
        "neighborhood_prompts": ["Cake is made of", "Pasta is made of", "Dough needs"]},
    {"prompt": "The slow river is", "subject": "river", "target_new": "warm and wide", "ground_truth": "cold",
        "rephrase_prompt": "Rivers are"},
    {"prompt": "People keep bees", "subject": "bees", "target_new": "here"},
]  # fmt: skip


def plain(model, tok, prompt, answer):
    """Mean NLL and argmax of an answer, as CounterFact's evaluation has it."""
    start, ids = len(tok(prompt)["input_ids"]), tok(f"{prompt} {answer}")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    targets = torch.tensor(ids[start:])
    rows = logits[start - 1 : -1]
    return float(F.cross_entropy(rows, targets)), bool((rows.argmax(1) == targets).all())


def test_scores_equal_one_prompt_at_a_time(model, tok):
    probes = [Probe("The bread", "is warm"), Probe("A", "b"), Probe("The slow and wide river goes", "by")]
    for one, probe in zip(score(model, tok, probes, batch_tokens=20), probes):
        nll, is_argmax = plain(model, tok, probe.prompt, probe.answer)
        assert one.nll == pytest.approx(nll, rel=SCORES)
        assert one.is_argmax == is_argmax


def test_an_argmax_answer_is_found(model, tok):
    """The twin of the above, where random models never give the answer asked for."""
    ids = tok("The slow river")["input_ids"]
    with torch.no_grad():
        order = model(torch.tensor([ids])).logits[0, -1].argsort(descending=True)
    for token in order.tolist():
        answer = tok.decode([token])
        if answer.startswith(" ") and tok(answer)["input_ids"] == [token] and answer.strip():
            break
    (found,) = score(model, tok, [Probe("The slow river", answer.strip())])
    assert found.is_argmax == (token == int(order[0]))
    assert found.nll == pytest.approx(plain(model, tok, "The slow river", answer.strip())[0], rel=SCORES)


def test_counterfact_figures_equal_the_formulae(model, tok):
    evaluation = evaluate(model, tok, RECORDS)
    first = evaluation.records[0]

    def prefers(prompt, a, b):
        return plain(model, tok, prompt, a)[0] < plain(model, tok, prompt, b)[0]

    fact = RECORDS[0]
    assert first.efficacy == prefers("The bread is made of", "water", "flour")
    assert first.generalization == pytest.approx(
        sum(prefers(p, "water", "flour") for p in fact["paraphrase_prompts"]) / 2
    )
    assert first.specificity == pytest.approx(
        sum(prefers(p, "flour", "water") for p in fact["neighborhood_prompts"]) / 3
    )
    assert first.rewrite_accuracy == plain(model, tok, "The bread is made of", "water")[1]
    second, third = evaluation.records[1:]
    assert second.efficacy == prefers("The slow river is", "warm and wide", "cold")
    assert second.specificity is None
    assert (third.efficacy, third.generalization) == (None, None)
    assert evaluation.efficacy == pytest.approx(
        (first.efficacy + second.efficacy) / 2
    )  # the third has no true answer
    assert [record.case_id for record in evaluation.records] == [3, None, None]


def holds_the_formulae(model, tok, records):
    """Meng et al. 2022, section 3.4 and appendix: each figure of each record, from one prompt with one answer
    at a time.
    """
    found = evaluate(model, tok, records).records
    for one, record in zip(found, records, strict=True):
        fact = record["requested_rewrite"]
        new, true = fact["target_new"]["str"], fact["target_true"]["str"]

        def means(prompts, wanted, other):
            nlls = [
                (plain(model, tok, prompt, wanted), plain(model, tok, prompt, other)) for prompt in prompts
            ]
            n = len(nlls)
            return (
                (sum(a[0] < b[0] for a, b in nlls) / n, sum(a[1] for a, _ in nlls) / n) if n else (None, None)
            )

        assert (one.efficacy, one.rewrite_accuracy) == means(
            [fact["prompt"].format(fact["subject"])], new, true
        )
        for given, expected in (
            ((one.generalization, one.paraphrase_accuracy), means(record["paraphrase_prompts"], new, true)),
            ((one.specificity, one.neighborhood_accuracy), means(record["neighborhood_prompts"], true, new)),
        ):
            assert given == pytest.approx(expected)
    return found


@pytest.fixture(scope="module")
def fifty():
    records = json.loads(packaged_text("demo_facts.json"))
    return records[:50]


def test_fifty_records_equal_the_formulae(model, tok, fifty):
    found = holds_the_formulae(model, tok, fifty)
    assert len({one.specificity for one in found}) > 2  # the figures differ from record to record


@pytest.mark.slow  # three minutes of one prompt at a time
def test_fifty_records_equal_the_formulae_on_the_real_model(smollm2, fifty):
    found = holds_the_formulae(*smollm2, fifty)
    assert sum(one.neighborhood_accuracy for one in found) > 0


def test_efficacy_turns_with_the_answers(model, tok):
    swapped = {**RECORDS[1], "target_new": "cold", "ground_truth": "warm and wide"}
    a, b = evaluate(model, tok, RECORDS[1:2]), evaluate(model, tok, [swapped])
    assert a.efficacy == 1 - b.efficacy


def test_evaluation_leaves_the_model_as_found(model, tok):
    model.train()
    model.requires_grad_(True)
    evaluate(model, tok, RECORDS)
    perplexity(model, tok, "Bread needs flour and water.")
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("batch_tokens", [8, 1000])
def test_perplexity_equals_the_plain_one(model, tok, demo_text, batch_tokens):
    text, window = demo_text[:400], 8
    ids = tok(text)["input_ids"][:61]
    total, count = 0.0, 0
    for start in range(0, len(ids), window):
        row = torch.tensor([ids[start : start + window]])
        if row.shape[1] > 1:
            with torch.no_grad():
                total += float(F.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum"))
            count += row.shape[1] - 1
    found = perplexity(model, tok, text, window=window, max_tokens=61, batch_tokens=batch_tokens)
    assert found == pytest.approx(math.exp(total / count), rel=SCORES)


def test_perplexity_needs_text(model, tok):
    with pytest.raises(RequestError, match="fewer than two tokens"):
        perplexity(model, tok, "")


def test_what_texts_begin_with_runs_once(model, tok, monkeypatch):
    """27 texts of up to nine words, in rows of 48 tokens at most: fewer tokens than there are in all."""
    seen = []
    true = scoring.logits_at
    monkeypatch.setattr(scoring, "logits_at", lambda *args: seen.append(args[1]) or true(*args))
    words = ("bread", "river", "bees")
    probes = [
        Probe(f"The slow and wide {a} and the {b}", f"{c} is") for a in words for b in words for c in words
    ]
    score(model, tok, probes)
    texts = {tuple(tok(f"{probe.prompt} {probe.answer}")["input_ids"][:-1]) for probe in probes}
    assert all(batch.mask.ndim == 4 and batch.ids.shape[1] <= 48 for batch in seen)
    assert sum(batch.ids.numel() for batch in seen) < 0.6 * sum(map(len, texts))


def test_answers_share_passes(model, tok, monkeypatch):
    """A text that another one begins with is read off its pass; the scores stay those of one prompt at a
    time.
    """
    seen = []
    true = scoring.logits_at
    monkeypatch.setattr(scoring, "logits_at", lambda *args: seen.append(args[1].ids.shape) or true(*args))
    probes = [Probe("The bread", answer) for answer in ("is warm", "is warm and wide", "is", "is warm")] + [
        Probe("Bread", "is")
    ]
    scores = score(model, tok, probes)
    assert sum(rows for rows, _ in seen) == 2
    for one, probe in zip(scores, probes):
        nll, is_argmax = plain(model, tok, probe.prompt, probe.answer)
        assert one.nll == pytest.approx(nll, rel=SCORES)
        assert one.is_argmax == is_argmax
        assert 0 <= one.accuracy <= 1
        assert len(one.predicted) == len(tok(f"{probe.prompt} {probe.answer}")["input_ids"]) - len(
            tok(probe.prompt)["input_ids"]
        )
