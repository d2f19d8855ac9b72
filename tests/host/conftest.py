"""A real checkout of EasyEdit, and tiny models saved so that its loader takes them.

EasyEdit chooses how to load a model by what its name contains, and writes logs into the working folder; so
these tests run in a folder of their own, where the models have relative names.
"""

import importlib.resources
import json
import logging
import os

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import easyedit_rls
from tests.conftest import SMOLLM2, tiny_settings

END = "<|endoftext|>"
COMMON = {
    "vocab_size": 600,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.15,
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
MODELS = {
    "tiny-gpt": lambda: GPT2LMHeadModel(
        GPT2Config(**COMMON, n_embd=32, n_inner=32, n_layer=4, n_head=4, n_positions=1024)
    ),
    "tiny-llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, **SIZES)),
    "tiny-qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, **SIZES)),
}


@pytest.fixture(scope="session")
def easyeditor():
    """EasyEdit with RLSEdit registered."""
    if "EASYEDIT_HOME" not in os.environ:
        pytest.skip(
            "no checkout of EasyEdit: git clone https://github.com/zjunlp/EasyEdit, "
            "then make test-host EASYEDIT_HOME=<its folder>"
        )
    easyedit_rls.register()
    import easyeditor

    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("easyeditor.editors.editor").setLevel(logging.WARNING)
    return easyeditor


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, demo_text):
    """tiny-gpt, tiny-llama, tiny-qwen2 and the real smollm2-llama, side by side."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([demo_text], trainer)
    tok = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=END, eos_token=END, pad_token=END)
    tok.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    for name, build in MODELS.items():
        torch.manual_seed(0)
        build().save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    if SMOLLM2.is_dir():
        (folder / "smollm2-llama").symlink_to(SMOLLM2.absolute())
    return folder


@pytest.fixture(autouse=True)
def _working_folder(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder)


@pytest.fixture(params=[*sorted(MODELS), "smollm2-llama"])
def name(request, model_folder) -> str:
    if not (model_folder / request.param / "config.json").is_file():
        pytest.skip(
            f"no model in {SMOLLM2}: run `make test`, which sets it up, or set EASYEDIT_RLS_TEST_MODEL"
        )
    return request.param


@pytest.fixture
def hparams(easyeditor, name):
    """Settings for the tiny model of this test, in EasyEdit's class."""
    return lambda **changes: host_settings(easyeditor, name, **changes)


def demo_records() -> list[dict]:
    """The 64 records in CounterFact's format that come with the package."""
    place = importlib.resources.files("easyedit_rls.data").joinpath("demo_facts.json")
    return json.loads(place.read_text(encoding="utf-8"))


def host_settings(easyeditor, name: str, **changes):
    settings = tiny_settings(
        "gpt2" if "gpt" in name else "llama", model_name=name, v_num_grad_steps=8
    ).to_dict()
    # few steps, and a prior that needs no text: these tests ask whether the state is right, not how well it
    # edits
    if name == "smollm2-llama":
        settings.update(v_loss_layer=29, v_num_grad_steps=3, lambda_reg=5.0, mom2_adjustment=False)
    return easyeditor.RLSEditHyperParams.from_dict({**settings, **changes})


@pytest.fixture
def edits() -> dict:
    """What EasyEdit's edit and batch_edit take, for four facts."""
    subjects = ["Oder", "Anna Maria Keller", "Mount Sainte-Victoire", "rye"]
    prompts = [
        "The river Oder",
        "Of course, Anna Maria Keller",
        "Some say Mount Sainte-Victoire has",
        "Bakers know rye",
    ]
    return {
        "prompts": prompts,
        "subject": subjects,
        "target_new": ["people", "water", "slow leaves", "well"],
        "ground_truth": ["water", "people", "stones", "bread"],
        "rephrase_prompts": [f"It is said: {prompt}" for prompt in prompts],
        "locality_inputs": {"near": {"prompt": ["The river Rhine"] * 4, "ground_truth": ["flows"] * 4}},
    }
