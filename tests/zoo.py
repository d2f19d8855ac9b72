"""Tiny random models of many decoder families, four layers each, for the tokenizer of conftest.py."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

_SPECIAL = {
    "vocab_size": 600, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.15,
}  # fmt: skip
_PLAIN = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, **_SPECIAL}
_GATED = {"intermediate_size": 48, "num_key_value_heads": 2, **_PLAIN}
_GPT = {"n_embd": 32, "n_inner": 48, "n_layer": 4, "n_head": 4, **_SPECIAL}
_OPT = {**{k: v for k, v in _PLAIN.items() if k != "initializer_range"}, "ffn_dim": 48, "init_std": 0.15}

# Class, config, and where its parts are: layers, projection, final norm
_FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, str, str]]] = {
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 4, "n_head": 4, **_SPECIAL},
        ("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f")),
    "codegen": ("CodeGen", {"rotary_dim": 4, **_GPT}, ("transformer.h", "mlp.fc_out", "transformer.ln_f")),
    # Scaled logits
    "cohere": ("Cohere", {"logit_scale": 2.0, **_GATED}, ("model.layers", "mlp.down_proj", "model.norm")),
    # Attention beside the MLP
    "falcon": ("Falcon", _PLAIN, ("transformer.h", "mlp.dense_4h_to_h", "transformer.ln_f")),
    # Capped logits, two kinds of layers
    "gemma2": ("Gemma2", {"head_dim": 8, **_GATED}, ("model.layers", "mlp.down_proj", "model.norm")),
    "gemma3": ("Gemma3", {"head_dim": 8, **_GATED}, ("model.layers", "mlp.down_proj", "model.norm")),
    # Gate and up in one module
    "glm4": ("Glm4", {"head_dim": 8, **_GATED}, ("model.layers", "mlp.down_proj", "model.norm")),
    # Square Conv1D
    "gpt2": ("GPT2", {**_GPT, "n_inner": 32}, ("transformer.h", "mlp.c_proj", "transformer.ln_f")),
    "gpt_bigcode": ("GPTBigCode", _GPT, ("transformer.h", "mlp.c_proj", "transformer.ln_f")),
    "gpt_neox": ("GPTNeoX", {"intermediate_size": 48, **_PLAIN},
        ("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm")),
    # A head with bias
    "gptj": ("GPTJ", {"rotary_dim": 4, **_GPT}, ("transformer.h", "mlp.fc_out", "transformer.ln_f")),
    "granite": ("Granite", {"logits_scaling": 0.5, "residual_multiplier": 0.4, **_GATED},
        ("model.layers", "mlp.down_proj", "model.norm")),
    "llama": ("Llama", _GATED, ("model.layers", "mlp.down_proj", "model.norm")),
    "mistral": ("Mistral", _GATED, ("model.layers", "mlp.down_proj", "model.norm")),
    "olmo2": ("Olmo2", _GATED, ("model.layers", "mlp.down_proj", "model.norm")),
    "opt": ("OPT", {"word_embed_proj_dim": 32, **_OPT},
        ("model.decoder.layers", "fc2", "model.decoder.final_layer_norm")),
    # As OPT-350m: norms behind, a projection and no norm before the head
    "opt_post": ("OPT", {"word_embed_proj_dim": 16, "do_layer_norm_before": False, **_OPT},
        ("model.decoder.layers", "fc2", "")),
    "phi": ("Phi", _GATED, ("model.layers", "mlp.fc2", "model.final_layernorm")),
    "phi3": ("Phi3", _GATED, ("model.layers", "mlp.down_proj", "model.norm")),
    "qwen2": ("Qwen2", _GATED, ("model.layers", "mlp.down_proj", "model.norm")),
    "qwen3": ("Qwen3", {"head_dim": 8, **_GATED}, ("model.layers", "mlp.down_proj", "model.norm")),
    "smollm3": ("SmolLM3", _GATED, ("model.layers", "mlp.down_proj", "model.norm")),
    "stablelm": ("StableLm", _GATED, ("model.layers", "mlp.down_proj", "model.norm")),
}  # fmt: skip
FAMILIES = sorted(_FAMILIES)
PLACES = {
    name: places for name, (_, _, places) in _FAMILIES.items()
}  # list of layers, projection in a layer, final norm


def make(name: str) -> PreTrainedModel:
    """A random model of a family, the same each time."""
    family, settings, _ = _FAMILIES[name]
    return _build(family, settings)


def mixture() -> PreTrainedModel:
    """Every MLP is a mixture of experts."""
    return _build("Mixtral", {"num_local_experts": 4, **_GATED})


def half_mixture() -> PreTrainedModel:
    """Layers 0 and 1 have plain MLPs, 2 and 3 mixtures of experts."""
    heads = {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    }  # fmt: skip
    experts = {"n_routed_experts": 4, "first_k_dense_replace": 2, "moe_intermediate_size": 16, "n_group": 1,
        "topk_group": 1}  # fmt: skip
    return _build("DeepseekV3", {"num_experts_per_tok": 2, **heads, **experts, **_GATED})


def without_attention() -> PreTrainedModel:
    """A state-space model."""
    return _build("Mamba", {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 600})


def by_count() -> PreTrainedModel:
    """MPT: its positions are counted over padding, and can't be told."""
    return _build("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 4, "vocab_size": 600})


def with_pictures() -> PreTrainedModel:
    """A text decoder beside a vision tower, which has layers too."""
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config={"head_dim": 8, **_GATED}, vision_config=vision)
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def _build(family: str, settings: dict[str, Any]) -> PreTrainedModel:
    config: Callable[..., Any] = getattr(
        transformers, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    )
    head = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    torch.manual_seed(0)
    model: PreTrainedModel = head(config(**settings)).eval()
    return model
