"""A model's own generation settings change nothing that is written here, and are put back as they were."""

import pytest
import torch
from transformers import GenerationConfig

from easyedit_rls.cli.demo import _complete
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.evaluation import answers, generate
from easyedit_rls.model.generation import greedy, plain_generation, write_on
from easyedit_rls.model.sampling import sample_templates, sample_texts
from tests.conftest import tiny_llama

PROMPTS = ["The bread is made of", "The slow and wide river"]
COMMON = list(range(100, 400))  # tokens that a tiny model writes now and then

TRAPS = {
    "repetition_penalty": 3.0, "num_beams": 3, "no_repeat_ngram_size": 1, "stop_strings": ["e", "a", "o"],
    "forced_eos_token_id": 7, "bad_words_ids": [[token] for token in COMMON], "suppress_tokens": COMMON,
    "begin_suppress_tokens": COMMON, "sequence_bias": [[[token], 50.0] for token in COMMON],
    "exponential_decay_length_penalty": (1, 50.0), "min_p": 0.9, "typical_p": 0.05, "epsilon_cutoff": 0.5,
    "guidance_scale": 4.0, "return_dict_in_generate": True,
}  # fmt: skip
TOGETHER = {name: value for name, value in TRAPS.items() if name != "guidance_scale"} | {
    "num_return_sequences": 2
}


def written(model, tok):
    """Everything that this package lets a model write."""
    facts = parse_requests([{"prompt": "The river Oder", "subject": "Oder", "target_new": "people"}])
    return {
        "generate": generate(model, tok, PROMPTS, max_new_tokens=8),
        "sampled": generate(model, tok, PROMPTS, max_new_tokens=8, top_k=50, seed=1),
        "answers": answers(model, tok, PROMPTS, ["people"] * 2, max_new_tokens=8),
        "templates": sample_templates(model, tok, 3, seed=0),
        "texts": list(sample_texts(model, tok, 4, 8, seed=0)),
        "completions": _complete(model, tok, facts),
    }


@pytest.fixture(scope="module")
def plain(tok):
    return written(tiny_llama(), tok)


@pytest.mark.parametrize(
    "traps", [*({name: value} for name, value in TRAPS.items()), TOGETHER], ids=[*TRAPS, "together"]
)
def test_traps_change_nothing(tok, plain, traps):
    model = tiny_llama()
    trapped = GenerationConfig(eos_token_id=1, pad_token_id=1, **traps)
    as_found = trapped.to_dict()
    model.generation_config = trapped
    assert written(model, tok) == plain
    assert model.generation_config is trapped
    assert trapped.to_dict() == as_found


@pytest.mark.parametrize(
    "name", ["repetition_penalty", "no_repeat_ngram_size", "suppress_tokens", "forced_eos_token_id"]
)
def test_a_trap_is_one(tok, plain, name):
    """Without the guard these settings do change what is written, though the call says nothing of them."""
    model = tiny_llama()
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=1, **{name: TRAPS[name]})
    ids = torch.tensor([tok(PROMPTS[0])["input_ids"]])
    given = greedy(model, tok, max_new_tokens=8)
    leaked = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=given)
    assert leaked.tolist() != write_on(model, tok, ids, torch.ones_like(ids), given).tolist()


def test_the_model_keeps_its_own_end_tokens(tok):
    model = tiny_llama()
    model.generation_config = GenerationConfig(eos_token_id=[5, 9])
    assert greedy(model, tok, max_new_tokens=2).eos_token_id == [5, 9]
    model.generation_config = GenerationConfig()
    assert greedy(model, tok, max_new_tokens=2).eos_token_id == tok.eos_token_id


def test_settings_come_back_after_an_error(tok):
    model = tiny_llama()
    own = model.generation_config
    with pytest.raises(KeyError), plain_generation(model):
        assert model.generation_config is not own
        raise KeyError
    assert model.generation_config is own
    ids = torch.tensor([[2, 10_000]])  # no such token
    with pytest.raises(IndexError):
        write_on(model, tok, ids, torch.ones_like(ids), greedy(model, tok, max_new_tokens=2))
    assert model.generation_config is own


def test_a_model_without_settings_of_its_own_writes(tok, plain):
    model = tiny_llama()
    model.generation_config = None
    assert generate(model, tok, PROMPTS, max_new_tokens=8) == plain["generate"]
