"""Texts as tokens: start tokens once and everywhere, end tokens never, a prompt's tokens whatever follows."""

import pytest
import torch

from easyedit_rls.anchors.pairs import anchor_pairs
from easyedit_rls.anchors.text import token_blocks
from easyedit_rls.data.requests import Probe, parse_requests
from easyedit_rls.errors import LayoutError, RequestError
from easyedit_rls.evaluation import answers, edit_quality, evaluate, generate, perplexity
from easyedit_rls.facts.keys import locate_facts
from easyedit_rls.model.sampling import sample_templates, sample_texts
from easyedit_rls.model.subject import answer_rows, prompt_rows, tokenize_fact
from easyedit_rls.model.tokens import continue_with, encode, end_tokens, start_tokens
from tests.conftest import tiny_llama, tiny_settings
from tests.tokenizers import byte_level, qwen_like, sentencepiece_like
from tests.tolerances import SCORES

FACT = {"prompt": "The bread is made of", "subject": "bread", "target_new": "warm leaves",
    "ground_truth": "flour"}  # fmt: skip


@pytest.fixture(scope="module")
def plain(demo_text):
    return byte_level(demo_text)


@pytest.fixture(scope="module")
def starting(demo_text):
    return byte_level(demo_text, ("<s>",))


@pytest.fixture(scope="module")
def ending(demo_text):
    """Both a start token and an appended end token,
    as some tokenizers of encoders turned decoders have them.
    """
    return byte_level(demo_text, ("<s>",), ("<end>",))


@pytest.fixture(scope="module")
def wide_model():
    return tiny_llama(900)


def test_what_a_post_processor_adds(plain, starting, ending):
    assert [(start_tokens(tok), end_tokens(tok)) for tok in (plain, starting, ending)] == [
        ((), ()),
        ((1,), ()),
        ((1,), (2,)),
    ]


@pytest.mark.parametrize("text", ["The bread", "<s>The bread", "<s>", ""])
def test_a_start_token_stands_in_front_once(starting, text):
    ids = encode(starting, text).ids
    assert ids[0] == 1
    assert ids.count(1) == 1
    assert encode(starting, text, max_tokens=2).ids == ids[:2]


def test_a_prompt_that_begins_with_the_start_token_is_the_same_prompt(starting, wide_model):
    given, other = ({**FACT, "prompt": f"{start}The bread is made of"} for start in ("<s>", ""))
    rows = [fact.rows[0] for fact in locate_facts(starting, parse_requests([given, other]), [])]
    assert rows[0] == rows[1]
    assert evaluate(wide_model, starting, given) == evaluate(wide_model, starting, other)
    texts = generate(wide_model, starting, [given["prompt"], other["prompt"]], max_new_tokens=4)
    assert texts[0] == texts[1]


def test_every_use_has_the_start_token_and_none_the_end_token(ending, wide_model, tmp_path, demo_text):
    (tmp_path / "text.txt").write_text(demo_text[:2000], encoding="utf-8")
    settings = tiny_settings("llama", mom2_dataset=str(tmp_path / "text.txt"), statements=["{}:"])
    (fact,) = locate_facts(ending, parse_requests(FACT), ["It is so. "], settings.statements)
    rows = [row.ids for row in (*fact.rows, *fact.statements, fact.kl_prompt)]
    rows += [row.ids for row in answer_rows(ending, [Probe("The bread", "is")])]
    rows += prompt_rows(ending, ["The bread"])
    rows += [row for block in token_blocks(wide_model, ending, settings) for row in block]
    rows += [row for block in sample_texts(wide_model, ending, 2, 4, 0) for row in block]
    assert [row for row in rows if row[0] != 1 or 1 in row[1:] or 2 in row] == []
    seen = []
    wide_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        sample_templates(wide_model, ending, 1, 0)
        anchor_pairs(wide_model, ending, settings, ["The bread"])
    finally:
        wide_model._forward_pre_hooks.clear()
    assert all(ids[0] == 1 and 2 not in ids for ids in (seen[0], seen[-1]))


def test_texts_are_written_from_the_start_token_alone_where_there_is_one(ending, wide_model, tok):
    """A random first token out of a vocabulary of many languages begins texts in all of them."""
    given = []
    wide_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    try:
        next(sample_texts(wide_model, ending, 6, 2, 0))
        written_from = given[0]
        given.clear()
        next(sample_texts(wide_model, tok, 6, 2, 0))
    finally:
        wide_model._forward_pre_hooks.clear()
    assert written_from == [[1]] * 6
    assert len({tuple(row) for row in given[0]}) > 1
    assert {len(row) for row in given[0]} == {1}


def test_an_appended_end_token_does_no_harm_to_figures(ending, starting, wide_model):
    """It used to make answers empty, and the tokens counted for EasyEdit's figures those behind the end."""
    assert answers(wide_model, ending, [FACT["prompt"]], ["x"]) == answers(
        wide_model, starting, [FACT["prompt"]], ["x"]
    )
    ids = starting(FACT["prompt"])["input_ids"]
    with torch.no_grad():
        said = starting.decode(wide_model(torch.tensor([ids])).logits[0, -1].argmax())
    (found,) = edit_quality(wide_model, ending, [{"prompt": FACT["prompt"], "target_new": said, "joint": ""}])
    assert found["rewrite_acc"] == [1.0]


@pytest.mark.parametrize("window", [7, 64])
def test_perplexity_has_the_start_token_before_each_window(starting, plain, wide_model, demo_text, window):
    text = demo_text[:900]
    own = plain(text)["input_ids"]
    for tok, start in ((starting, [1]), (plain, [])):
        losses = []
        for at in range(0, len(own), window):
            row = torch.tensor([start + own[at : at + window]])
            with torch.no_grad():
                logits = wide_model(row).logits[0, :-1]
            losses.append(
                torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")[len(start) :]
            )
        expected = float(torch.cat(losses).mean().exp())
        assert perplexity(wide_model, tok, text, window=window) == pytest.approx(expected, rel=SCORES)
        assert perplexity(wide_model, tok, f"<s>{text}" if start else text, window=window) == pytest.approx(
            expected, rel=SCORES
        )


@pytest.mark.parametrize("make", [byte_level, sentencepiece_like, qwen_like])
@pytest.mark.parametrize(("prompt", "behind"), [
    ("The river", " goes by"),
    ("The river", "s"),
    ("西游记的作者是", "小明"),
    ("def area(w, h):\n", "    return w * h"),
    ("def area(w, h):\n   ", "    return w * h"),
    ("ends in ", " spaces"),
    ("e", "\u0301x"),
    ("1", "2"),
])  # fmt: skip
def test_a_continuation_leaves_the_prompt_alone_and_reads_as_it_is(demo_text, make, prompt, behind):
    tok = make(demo_text)
    encoded = encode(tok, prompt)
    ids = continue_with(tok, encoded, prompt, behind)
    assert tok.decode(encoded.ids + ids).removeprefix("<s> ") == prompt + behind
    assert ids


def test_a_continuation_that_no_tokens_read_as_is_refused(plain, monkeypatch):
    monkeypatch.setattr("easyedit_rls.model.tokens._NEUTRAL", ())
    with pytest.raises(
        RequestError,
        match=r"field 'target_new'.*'er' has no tokens of its own behind 'The riv'.*joint to a space",
    ):
        tokenize_fact(plain, "The ", "riv", "", "er", joint="")


def test_slow_tokenizers_are_refused():
    class Slow:
        is_fast = False

    with pytest.raises(LayoutError, match=r"Slow gives no character offsets.*use_fast"):
        encode(Slow(), "a")


def test_perplexity_of_one_token_is_refused(starting, plain, wide_model):
    for tok in (starting, plain):
        with pytest.raises(RequestError, match="fewer than two tokens"):
            perplexity(wide_model, tok, "a")
