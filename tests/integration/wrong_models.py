"""Wrong models: folders that hold none, or one that can't be loaded whole or can't be edited."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration

from easyedit_rls.errors import HyperParamsError, ModelError
from easyedit_rls.model.load import load_model, load_weights
from tests.conftest import tiny_gpt2, tiny_llama
from tests.integration.wrong_inputs import (
    COMPARE,
    EDIT,
    INIT,
    LATIN,
    POINTER,
    Wrong,
    changed,
    halved,
    load,
    removed,
    written,
)


def sharded(then: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """The model in several files, of which one is spoiled."""

    def spoil(folder: Path) -> None:
        (folder / "model" / "model.safetensors").unlink()
        tiny_llama().save_pretrained(folder / "model", max_shard_size="40KB")
        (shard,) = (folder / "model").glob("model-00002-of-*.safetensors")
        shard.rename(folder / "second")
        then(folder)
        if (folder / "second").exists():
            (folder / "second").rename(shard)

    return spoil


def as_bin(folder: Path) -> None:
    """The weights as torch.save writes them, cut off."""
    (folder / "model" / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), folder / "model" / "pytorch_model.bin")
    halved("model/pytorch_model.bin")(folder)


def rewritten(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], Any]:
    """Other weights in the file."""

    def spoil(folder: Path) -> None:
        path = folder / "model" / "model.safetensors"
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return spoil


def t5(folder: Path) -> None:
    shutil.rmtree(folder / "model" / "model.safetensors", ignore_errors=True)
    config = T5Config(vocab_size=600, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(folder / "model")


def slow_only(folder: Path) -> None:
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "tokenizer_config.json").unlink()
    (folder / "model" / "tokenizer.model").write_bytes(b"no SentencePiece model")


def without_vocabulary(folder: Path) -> None:
    """GPT-2's tokenizer class gives an empty one where it finds no files."""
    shutil.rmtree(folder / "model")
    tiny_gpt2().save_pretrained(folder / "model")


def adapter(folder: Path) -> None:
    removed("model/config.json", "model/model.safetensors")(folder)
    (folder / "model" / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "some/model", "peft_type": "LORA"})
    )


MODELS = [
    Wrong("no folder", None, lambda f, t: load_model("./nowhere"), ModelError,
        "There is no folder /.*nowhere", ("init", "./nowhere")),
    Wrong("a file", None, lambda f, t: load_model(str(f / "model/config.json")), ModelError,
        "config.json is a file. Give the folder", ("init", "model/config.json")),
    Wrong("a pointer", written("model/model.safetensors", POINTER), load, ModelError,
        "Git LFS pointer.* git lfs pull", INIT),
    Wrong("a pointer for a tokenizer", written("model/tokenizer.json", POINTER), load, ModelError,
        "tokenizer.json is a Git LFS", INIT),
    Wrong("cut off", halved("model/model.safetensors"), load, ModelError,
        r"model.safetensors is cut off .*\d+ bytes.* again", INIT),
    Wrong("cut off in its header", written("model/model.safetensors", b"\x08"), load, ModelError,
        "is cut off or damaged", INIT),
    Wrong("a .bin cut off", as_bin, load, ModelError, "pytorch_model.bin is cut off or damaged", INIT),
    Wrong("a shard cut off", sharded(halved("second")), load, ModelError,
        "model-00002-of-.* is cut off or damaged", INIT),
    Wrong("a shard missing", sharded(removed("second")), load, ModelError,
        "lacks model-00002-of-.*, which model.*index.json names", INIT),
    Wrong("no weights", removed("model/model.safetensors"), load, ModelError,
        "no file named model.safetensors", INIT),
    Wrong("weights missing", rewritten(lambda weights: {name: weight for name,
        weight in weights.items() if "layers.2.mlp" not in name}), load, ModelError,
        r"lacks weights of its model: model.layers.2.mlp.down_proj.weight, .*\. Copy", INIT),
    Wrong("weights of another shape", rewritten(lambda weights: {**weights,
        "model.norm.weight": torch.ones(5)}), load, ModelError,
        r"other shapes than its config: model.norm.weight \(5 for 32\)", INIT),
    Wrong("an unknown type", changed(model_type="foobar"), load, ModelError,
        "type 'foobar', which this version of transformers", INIT),
    Wrong("no type", changed(model_type=None), load, ModelError, "without a model_type in its config.json",
        INIT),
    Wrong("an encoder-decoder", t5, load, ModelError, r"\(t5\) is an encoder-decoder, not a causal", INIT),
    Wrong("no decoder", changed(model_type="vit"), load, ModelError, r"\(vit\) is no causal language model",
        INIT),
    *(Wrong(f"quantized by {how}", changed(quantization_config={"quant_method": how}), load, ModelError,
        rf"quantized \({how}\)", INIT,) for how in ("gptq", "awq", "bitsandbytes")),
    Wrong("config that is no JSON", written("model/config.json", "{'a': 1}"), load, ModelError,
        "config.json is no JSON: .* again", INIT),
    Wrong("config that is a list", written("model/config.json", "[1]"), load, ModelError,
        "holds a list, not a mapping", INIT),
    Wrong("config in Latin-1", written("model/config.json", LATIN), load, ModelError,
        r"config.json is not UTF-8 text: byte 6", INIT),
    Wrong("config out of range", changed(hidden_size=30), load, ModelError,
        "config.json of .* can't be used: .*hidden size", INIT),
    Wrong("no config", removed("model/config.json"), load, ModelError,
        "has no config.json, so it holds no model", INIT),
    Wrong("an adapter", adapter, load, ModelError, "holds an adapter .* Merge it into its model", INIT),
    Wrong("no tokenizer", removed("model/tokenizer.json", "model/tokenizer_config.json"), load, ModelError,
        "No fast tokenizer can be loaded .*model|has no tokenizer", INIT),
    Wrong("a slow tokenizer alone", slow_only, load, ModelError,
        r"It has a tokenizer.model alone\. Put the tokenizer.json", INIT),
    Wrong("an empty tokenizer", without_vocabulary, load, ModelError,
        "has no tokenizer: .* finds no vocabulary", INIT),
    Wrong("a tokenizer that is no JSON", written("model/tokenizer.json", "{"), load, ModelError,
        "No fast tokenizer can be loaded", INIT),
    Wrong("code of its own", changed(model_type="theirs",
        auto_map={"AutoConfig": "a.B", "AutoModelForCausalLM": "a.C"}), load, ModelError,
        "auto_map.* not run unless .*trust_remote_code=True in Python.* "
        "model.trust_remote_code=true.* --trust-remote-code", INIT),
    Wrong("trust that is neither", None, lambda f, t: load_model(str(f / "model"), trust_remote_code="maybe"),
        HyperParamsError, "trust_remote_code.*'maybe'", (*EDIT, "model.trust_remote_code=maybe")),
    Wrong("no such dtype", None, lambda f, t: load_model(str(f / "model"), "float99"), HyperParamsError,
        "dtype is 'float99'; allowed: float32, bfloat16", (*EDIT, "dtype=float99")),
    Wrong("a dtype that is a function", None, lambda f, t: load_weights(str(f / "model"), "zeros"),
        HyperParamsError, "dtype is 'zeros'", (*COMPARE, "dtype=zeros")),
]  # fmt: skip
