"""The layout is read off the modules; what can't be edited, or told, is said."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    Qwen2Config,
)

from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.errors import HyperParamsError, LayoutError
from easyedit_rls.model.discovery import read_structure
from easyedit_rls.model.layout import find_layout
from tests import zoo
from tests.conftest import tiny_llama, tiny_settings
from tests.tolerances import TWO_DIGITS


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_the_parts_of_every_family_are_found(name):
    model = zoo.make(name)
    structure = read_structure(model)
    assert (structure.layers, structure.projection, structure.final_norm) == zoo.PLACES[name]
    assert (structure.n_layers, structure.hidden, structure.obstacles) == (4, 32, {})
    assert model.get_submodule(structure.head) is model.get_output_embeddings()
    assert structure.is_tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    assert (
        "attention"
        in type(model.get_submodule(f"{structure.layers}.0.{structure.attention}")).__name__.lower()
    )
    layout = find_layout(model, RLSEditHyperParams.for_model(model))
    assert next(iter(layout.edited.values())).shape == (structure.key_width, 32)


LLAMA = {"hidden_act": "silu", "num_attention_heads": 32, "vocab_size": 1000}
REAL = {  # the published models' own figures; few words, which no layout depends on
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25, vocab_size=1000),
    "gpt-j-6B": GPTJConfig(n_embd=4096, n_layer=28, n_head=16, rotary_dim=64, vocab_size=1000),
    "llama-2-7b": LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, **LLAMA),
    "llama3-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8, **LLAMA
    ),
    "llama3.2-3b": LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_key_value_heads=8,
        **{**LLAMA, "num_attention_heads": 24},
    ),
    "qwen2.5-7b": Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=1000,
    ),
    "smollm2-135m": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_key_value_heads=3,
        **{**LLAMA, "num_attention_heads": 9},
    ),
}
WIDTHS = {  # d_k, d_v
    "gpt2-xl": (6400, 1600),
    "gpt-j-6B": (16384, 4096),
    "llama-2-7b": (11008, 4096),
    "llama3-8b": (14336, 4096),
    "llama3.2-3b": (8192, 3072),
    "qwen2.5-7b": (18944, 3584),
    "smollm2-135m": (1536, 576),
}


@pytest.mark.parametrize("name", sorted(REAL))
def test_shipped_settings_fit_the_real_layouts(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(REAL[name])
    hp = RLSEditHyperParams.from_hparams(name)
    names = read_structure(model).module_names()
    assert {key: getattr(hp, key) for key in names} == names
    assert hp.v_loss_layer == REAL[name].num_hidden_layers - 1
    assert {weight.shape for weight in find_layout(model, hp).edited.values()} == {WIDTHS[name]}
    own = RLSEditHyperParams.for_model(model)
    assert 0 < own.layers[0] <= own.layers[-1] < 0.4 * REAL[name].num_hidden_layers
    assert own.mom2_n_samples * 128 >= 16 * WIDTHS[name][0]


def test_settings_of_a_model_that_has_no_file(tmp_path):
    model = tiny_llama()
    hp = RLSEditHyperParams.for_model(model, layers=[1, 2], mom2_update_weight=30)
    assert (hp.layers, hp.v_loss_layer, hp.mom2_update_weight) == ([1, 2], 3, 30)
    (tmp_path / "own.yaml").write_text(hp.to_yaml(), encoding="utf-8")
    assert RLSEditHyperParams.from_hparams(tmp_path / "own.yaml") == hp
    with torch.no_grad():  # hidden states ten times as long: steps ten times as long
        model.model.embed_tokens.weight *= 10
        for layer in model.model.layers:
            layer.mlp.down_proj.weight *= 10
            layer.self_attn.o_proj.weight *= 10
    assert RLSEditHyperParams.for_model(model, layers=[1, 2]).v_lr == pytest.approx(
        10 * hp.v_lr, rel=TWO_DIGITS
    )
    with pytest.raises(HyperParamsError, match="did you mean 'layers'"):
        RLSEditHyperParams.for_model(model, layer=[1])


def test_mixtures_of_experts_are_refused_and_say_why():
    with pytest.raises(LayoutError, match=r"MixtralForCausalLM.*mlp.experts is a mixture of experts"):
        read_structure(zoo.mixture())
    model = zoo.half_mixture()
    assert sorted(read_structure(model).obstacles) == [2, 3]
    assert RLSEditHyperParams.for_model(model, layers=[0, 1]).layers == [0, 1]
    with pytest.raises(LayoutError, match=r"Layer 2 .*mixture of experts.*Layers that can: \[0, 1\]"):
        RLSEditHyperParams.for_model(model, layers=[1, 2])
    hp = RLSEditHyperParams.for_model(model, layers=[0, 1])
    with pytest.raises(LayoutError, match=r"Layer 2 can't be edited.*mixture of experts"):
        find_layout(model, RLSEditHyperParams.from_dict({**hp.to_dict(), "layers": [1, 2]}))


class Packed(nn.Module):
    """What GPTQ and AWQ put in a linear module's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class Eight(nn.Linear):
    """What bitsandbytes puts there."""

    def __init__(self) -> None:
        super().__init__(48, 32, bias=False)
        self.weight = nn.Parameter(torch.zeros(32, 48, dtype=torch.int8), requires_grad=False)


class Adapter(nn.Module):
    """What peft puts there."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(48, 32)
        self.lora_B = nn.Linear(4, 32)


@pytest.mark.parametrize(("module", "message"), [
    (Packed, r"mlp.down_proj is quantized \(Packed\).* Load the model in float32"),
    (Eight, r"mlp.down_proj is quantized \(Eight\)"),
    (Adapter, r"mlp.down_proj carries an adapter \(Adapter\). Merge it"),
])  # fmt: skip
def test_weights_that_are_not_plain_are_refused_and_say_why(module, message):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.down_proj = module()
    with pytest.raises(LayoutError, match=message):
        read_structure(model)
    with pytest.raises(LayoutError, match=message):
        find_layout(model, tiny_settings("llama"))


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_layout_that_cannot_be_told_says_what_was_found(name):
    model = zoo.make(name)
    hp = RLSEditHyperParams.for_model(model)
    layers, projection, _ = zoo.PLACES[name]
    parent, _, last = projection.rpartition(".")
    with pytest.raises(LayoutError, match=rf"no module '{layers}.\d.{projection}_2'.*close names: {layers}"):
        find_layout(
            model,
            RLSEditHyperParams.from_dict(
                {**hp.to_dict(), "rewrite_module_tmp": f"{layers}.{{}}.{projection}_2"}
            ),
        )
    for layer in model.get_submodule(layers):
        block = layer.get_submodule(parent) if parent else layer
        block.renamed = getattr(block, last)
        delattr(block, last)
    with pytest.raises(LayoutError, match=f"no module '{layers}"):
        find_layout(model, hp)
    assert read_structure(model).projection == f"{parent}.renamed".lstrip(".")
    if name == "gpt2":  # its MLP's first module gives 32 outputs too
        return
    for layer in model.get_submodule(layers):
        (layer.get_submodule(parent) if parent else layer).renamed = nn.Embedding(4, 32)
    with pytest.raises(
        LayoutError,
        match=r"no linear module outside of attention gives 32 outputs: .*renamed Embedding\(4, 32\)",
    ):
        read_structure(model)


def test_models_of_other_kinds_are_refused_and_say_what_was_found():
    with pytest.raises(
        LayoutError,
        match=r"no list of layers with attention; lists of modules in it: backbone.layers \(4 × MambaBlock\)",
    ):
        read_structure(zoo.without_attention())
    model = zoo.by_count()
    with pytest.raises(LayoutError, match=r"takes no position_ids and counts padding"):
        find_layout(model, RLSEditHyperParams.for_model(model))
    structure = read_structure(zoo.with_pictures())
    assert (structure.layers, structure.final_norm) == (
        "model.language_model.layers",
        "model.language_model.norm",
    )


def test_a_model_without_a_head_is_refused():
    model = AutoConfig.for_model("llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, vocab_size=600)  # fmt: skip
    with pytest.raises(LayoutError, match=r"no output head\. Load it with AutoModelForCausalLM"):
        read_structure(AutoModel.from_config(model))
