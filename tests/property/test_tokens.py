"""For any texts: the tokens that are trained, scored and generated behind are the same, and read as prompt,
joint and target.
"""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_rls.data.joints import joint
from easyedit_rls.data.requests import Probe
from easyedit_rls.model.subject import answer_rows, prompt_rows, tokenize_fact
from easyedit_rls.model.tokens import start_tokens
from tests.tokenizers import byte_level, qwen_like, sentencepiece_like

_WORDS = st.sampled_from(
    [
        " ",
        "\n",
        "    ",
        "the",
        " is",
        "river",
        "是",
        "小明",
        "作者",
        "def",
        "(w)",
        ":\n",
        "é",
        "e\u0301",
        "한",
        "가",
        "7",
        "42",
        '"',
        "。",
        "'s",
    ]
)
_ANY = st.text(st.characters(exclude_categories=["C"], exclude_characters="▁"), max_size=4)
_TEXTS = st.lists(_WORDS | _ANY, max_size=6).map("".join)


@pytest.fixture(scope="module", params=["byte level", "sentencepiece", "qwen", "smollm2"])
def any_tok(request, demo_text):
    made = {"byte level": byte_level, "sentencepiece": sentencepiece_like, "qwen": qwen_like}
    return made[request.param](demo_text) if request.param in made else request.getfixturevalue("smollm2")[1]


@settings(max_examples=150, deadline=None)
@given(
    before=_TEXTS, after=_TEXTS, target=_TEXTS.filter(bool), between=st.sampled_from([None, "", " ", "\n"])
)
def test_trained_scored_and_generated_behind_are_the_same(any_tok, before, after, target, between):
    prompt = f"{before}Oder{after}"
    probe = Probe(prompt, target, between)
    trained = tokenize_fact(any_tok, before, "Oder", after, target, joint=between)
    (scored,) = answer_rows(any_tok, [probe])
    (behind,) = prompt_rows(any_tok, [probe])
    assert trained.ids == scored.ids
    assert trained.target_start == scored.target_start == len(behind)
    assert trained.ids[: len(behind)] == behind
    start = start_tokens(any_tok)
    assert behind[: len(start)] == start
    assert trained.place < trained.target_start
    whole = prompt + (joint(prompt, target) if between is None else between) + target
    read = unicodedata.normalize(
        "NFC", any_tok.decode(list(trained.ids[len(start) :]), clean_up_tokenization_spaces=False)
    )
    expected = unicodedata.normalize("NFC", whole)
    assert read in (
        expected,
        expected.removeprefix(" "),
    )  # SentencePiece takes a text's first space for its own
