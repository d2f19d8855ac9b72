"""Shared fixtures: tiny random models with a tokenizer trained on our own text,
the real SmolLM2, requests.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from easyedit_rls import RLSEditHyperParams
from easyedit_rls.data.packaged import packaged_text

REPOSITORY = Path(__file__).parents[1]
SMOLLM2 = Path(os.environ.get("EASYEDIT_RLS_TEST_MODEL", REPOSITORY / "models" / "smollm2-135m"))


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Moments are cached in a folder of this test run, never in the user's.

    Of the session, since a module's fixtures come before a test's: what they start has to find the same
    moments, which differ in their last bits between numbers of threads.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EASYEDIT_RLS_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True, scope="session")
def _interruptible():
    """SIGINT raises KeyboardInterrupt also where the run is in the background of a script, which starts its
    programs deaf to it.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def demo_text() -> str:
    return shipped_text()


def shipped_text() -> str:
    return packaged_text("demo_text.txt")


@pytest.fixture(scope="session")
def tok(demo_text) -> PreTrainedTokenizerFast:
    return tiny_tokenizer(demo_text)


def tiny_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, 600 tokens, with an unknown token and no start token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<end>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )


def tiny_llama(vocabulary: int = 600) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15,
        bos_token_id=None, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(vocabulary: int = 600) -> GPT2LMHeadModel:
    """Its MLP width equals its hidden width, so the shape of the edited weight says nothing of its
    orientation.
    """
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_embd=32, n_inner=32, n_layer=4, n_head=4, n_positions=256,
        initializer_range=0.15, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


FAMILIES = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=sorted(FAMILIES))
def family(request) -> str:
    return request.param


@pytest.fixture
def model(family):
    return FAMILIES[family]()


def spoil(solution):
    """Make a solution's covariance wrong in one entry, by far, and let it be looked at anew."""
    solution.__dict__.pop("_drift", None)
    panel = solution._parts.C.panels[0]
    panel[0, 1] += 10 * panel.abs().max()


def tiny_settings(family: str, **changes) -> RLSEditHyperParams:
    """Settings for the tiny models, whose weights take large steps; no text is sampled unless asked for."""
    names = {
        "llama": {
            "rewrite_module_tmp": "model.layers.{}.mlp.down_proj",
            "layer_module_tmp": "model.layers.{}",
            "mlp_module_tmp": "model.layers.{}.mlp",
            "attn_module_tmp": "model.layers.{}.self_attn",
            "ln_f_module": "model.norm",
            "lm_head_module": "lm_head",
        },
        "gpt2": {
            "rewrite_module_tmp": "transformer.h.{}.mlp.c_proj",
            "layer_module_tmp": "transformer.h.{}",
            "mlp_module_tmp": "transformer.h.{}.mlp",
            "attn_module_tmp": "transformer.h.{}.attn",
            "ln_f_module": "transformer.ln_f",
            "lm_head_module": "transformer.wte",
        },
    }[family]
    settings = {
        **names, "model_name": f"tiny-{family}", "layers": [1, 2], "clamp_norm_factor": 4.0,
        "v_num_grad_steps": 20, "v_lr": 0.3, "v_loss_layer": 3, "v_weight_decay": 0.01, "kl_factor": 0.0625,
        "mom2_update_weight": 20.0, "mom2_n_samples": 8, "lambda_reg": 0.1,
        "context_templates": ["The weather was fine. ", "In the morning we met. "], "max_deviation": "off",
    }  # fmt: skip
    return RLSEditHyperParams.from_dict({**settings, **changes})


@pytest.fixture
def settings(family):
    return lambda **changes: tiny_settings(family, **changes)


# Facts of unlike lengths; three subjects end their prompt, since random attention carries little from token
# to token.
FACTS = [
    {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"},
    {"prompt": "{}", "subject": "Anna Maria Keller", "target_new": "water"},
    {"prompt": "Some say {} has", "subject": "Mount Sainte-Victoire", "target_new": "slow leaves"},
    {"prompt": "Bakers know {}", "subject": "rye", "target_new": "well"},
]


@pytest.fixture(scope="session")
def requests() -> list[dict]:
    return [dict(fact) for fact in FACTS]


@pytest.fixture(scope="session")
def smollm2():
    """The real model and its tokenizer; copies are cheap, edits are not undone."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip(
            f"no model in {SMOLLM2}: run `make test`, which sets it up, or set EASYEDIT_RLS_TEST_MODEL"
        )
    return AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32), AutoTokenizer.from_pretrained(
        SMOLLM2
    )
