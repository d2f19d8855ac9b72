"""Generated text and what is measured on it, against the plain way: one prompt at a time."""

import math

import pytest
import torch

from easyedit_rls import RLSEditError
from easyedit_rls.evaluation import answers, consistency, fluency, generate
from easyedit_rls.evaluation.generation import judge

PROMPTS = ["The bread is made of", "A", "The slow and wide river goes by the old", "People keep bees"]


def plain(model, tok, prompt, n):
    """Greedy tokens by whole passes."""
    ids = tok(prompt)["input_ids"]
    start = len(ids)
    for _ in range(n):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == tok.eos_token_id:
            break
    return tok.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_tokens", [30, 10_000])
def test_greedy_text_equals_one_prompt_at_a_time(model, tok, batch_tokens):
    found = generate(model, tok, PROMPTS, max_new_tokens=8, batch_tokens=batch_tokens)
    assert found == [plain(model, tok, prompt, 8) for prompt in PROMPTS]
    assert len(set(found)) > 1


def test_text_ends_behind_a_stop(model, tok):
    whole = plain(model, tok, PROMPTS[0], 12)
    stop = whole.strip()[3]
    (found,) = generate(model, tok, PROMPTS[:1], max_new_tokens=12, stops=[stop])
    assert stop in found
    assert whole.startswith(found)
    assert len(found) < len(whole)


def test_sampling_has_a_seed_of_its_own(model, tok):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    some = [generate(model, tok, PROMPTS, max_new_tokens=8, top_k=50, seed=seed) for seed in (1, 1, 2)]
    assert torch.rand(1) == expected
    assert some[0] == some[1] != some[2]


def test_generation_leaves_model_and_tokenizer_as_found(model, tok):
    model.train()
    side = tok.padding_side
    generate(model, tok, PROMPTS, max_new_tokens=2)
    assert (model.training, tok.padding_side) == (True, side)


def test_answers_are_judged(model, tok):
    first = plain(model, tok, PROMPTS[0], 3)
    (found,) = answers(model, tok, PROMPTS[:1], ["never said"], max_new_tokens=3)
    assert first.strip().startswith(found.text)
    assert not found.is_contained
    (found,) = answers(model, tok, PROMPTS[:1], [found.text], max_new_tokens=3)
    assert found.is_exact == bool(found.text)


@pytest.mark.parametrize(
    ("text", "wanted", "is_exact", "is_contained"),
    [
        ("Paris", "Paris", True, True),
        ("the Paris!", "paris", True, True),
        ("Paris, in France", "Paris", False, True),
        ("Parisian", "Paris", False, False),
        ("", "Paris", False, False),
        ("New   York", "new york", True, True),
        ("the", "the", True, False),  # nothing is left of it
    ],
)
def test_exact_and_contained(text, wanted, is_exact, is_contained):
    found = judge(text, wanted)
    assert (found.is_exact, found.is_contained) == (is_exact, is_contained)


def test_fluency_is_the_weighted_entropy():
    pytest.importorskip("nltk", reason="fluency needs nltk: pip install 'easyedit-rls[evaluation]'")
    # "a b a b a": bigrams ab 2, ba 2; trigrams aba 2, bab 1
    h_2, h_3 = 1.0, -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert fluency(["a b a b a"]) == pytest.approx((2 / 3 * h_2 + 4 / 3 * h_3) / 2)
    assert fluency(["so so so so so"]) == 0
    assert fluency(["a b a b a", "so so so so so"]) == pytest.approx(fluency(["a b a b a"]) / 2)


def test_consistency_is_a_cosine():
    pytest.importorskip(
        "sklearn", reason="consistency needs scikit-learn: pip install 'easyedit-rls[evaluation]'"
    )
    assert consistency(["he paints in Rome"], ["he paints in Rome"]) == pytest.approx(1)
    assert consistency(["he paints"], ["rivers flow"]) == 0
    # one word in common of two each; idf of the common one 1, of the others 1 + ln(3/2)
    other = 1 + math.log(3 / 2)
    assert consistency(["red wine"], ["red stone"]) == pytest.approx(1 / (1 + other**2))


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nltk.tokenize", None)
    with pytest.raises(RLSEditError, match=r"easyedit-rls\[evaluation\]"):
        fluency(["a b"])
