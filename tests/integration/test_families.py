"""Other decoder families: the fast path of keys and values equals the plain one, whatever positions, norms and masks a family has."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from easyedit_rls.keys import LayerWalk, locate_facts
from easyedit_rls.model.capture import undisturbed
from easyedit_rls.model.layout import find_layout
from easyedit_rls.model.prefix import Heads, share_beginnings
from easyedit_rls.requests import parse_requests
from easyedit_rls.values import optimise_values
from tests.conftest import tiny_settings
from tests.reference import plain_key, plain_value
from tests.tolerances import PADDING, VALUES

GATED = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SPECIAL = {"vocab_size": 600, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.15}

MODELS = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=4, n_head=4, **SPECIAL)),  # positions from the mask alone
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(head_dim=8, sliding_window=128, final_logit_softcapping=None, **GATED, **SPECIAL)
    ),  # two kinds of layers
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, **SPECIAL)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=128, **GATED, **SPECIAL)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            init_std=0.15,
            **{key: value for key, value in SPECIAL.items() if key != "initializer_range"},
        )
    ),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED, **SPECIAL)),
}

NAMES = {
    "bloom": ("transformer.h.{}", "mlp.dense_4h_to_h", "transformer.ln_f"),
    "gemma2": ("model.layers.{}", "mlp.down_proj", "model.norm"),
    "gpt_neox": ("gpt_neox.layers.{}", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
    "mistral": ("model.layers.{}", "mlp.down_proj", "model.norm"),
    "opt": ("model.decoder.layers.{}", "fc2", "model.decoder.final_layer_norm"),
    "qwen2": ("model.layers.{}", "mlp.down_proj", "model.norm"),
}


@pytest.fixture(params=sorted(MODELS))
def located(request, tok, requests):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    layer, module, norm = NAMES[request.param]
    hp = tiny_settings("llama", layer_module_tmp=layer, rewrite_module_tmp=f"{layer}.{module}", ln_f_module=norm)
    facts = locate_facts(tok, parse_requests(requests), hp.context_templates)
    return model, find_layout(model, hp), facts, hp


def test_keys_equal_the_plain_path(located):
    model, layout, facts, hp = located
    assert share_beginnings([row.ids[: row.subject_last] for fact in facts for row in fact.rows], torch.device("cpu")) is not None
    walk = LayerWalk(model, layout, facts, 10_000)
    for layer in hp.layers:
        for key, fact in zip(walk.keys(layer), facts):
            torch.testing.assert_close(key, plain_key(model, layout, fact, layer), rtol=0, atol=PADDING)


def test_values_equal_the_plain_path(located):
    model, layout, facts, hp = located
    with undisturbed(model):
        values = optimise_values(model, layout, facts, hp)
    for i, fact in enumerate(facts):
        z, loss, _, steps = plain_value(model, layout, fact, hp)
        assert int(values.steps[i]) == steps
        assert float((values.z[i] - z).norm() / (z - values.h[i]).norm().clamp(min=1e-6)) < VALUES
        assert float(values.loss[i]) == pytest.approx(loss, rel=VALUES)


def test_heads_run_once_whatever_they_share(located):
    """What is cached equals what each text alone caches, in any selection, and shared tokens are run once."""
    model, layout, facts, _ = located
    texts = [row.ids[: row.subject_last] for fact in facts for row in fact.rows]
    n_tokens = []
    handle = layout.lower_layers[0].register_forward_hook(lambda module, args, out: n_tokens.append(args[0].shape[0] * args[0].shape[1]))
    with torch.no_grad():
        heads = Heads(model, layout.loss_layer, set(texts), 10_000)
        handle.remove()
        some = texts[::2] + texts[:1]
        cache, mask = heads.of(some)
        for i, text in enumerate(some):
            if text:
                alone, _ = Heads(model, layout.loss_layer, [text], 10_000).of([text])
                for whole, part in zip(cache.layers, alone.layers):
                    torch.testing.assert_close(whole.keys[i][:, mask[i].bool()], part.keys[0], rtol=0, atol=PADDING)
                    torch.testing.assert_close(whole.values[i][:, mask[i].bool()], part.values[0], rtol=0, atol=PADDING)
    assert sum(n_tokens) < sum(map(len, set(texts)))  # padding and all
