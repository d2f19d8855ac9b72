"""A model's folder or hub name, looked at before anything of it is loaded: what kind of model it is, and
whether its files are whole.
"""

import contextlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig

from easyedit_rls._base.files import read_text, user_path
from easyedit_rls.errors import HyperParamsError, ModelError

_CURE = (
    "Give a folder that save_pretrained wrote, or a hub name; "
    "`easyedit-rls demo-model` writes one to try things on."
)
_AGAIN = "Copy or download it again."
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)  # first found is read
_POINTER = b"version https://git-lfs.github.com/spec/"  # what Git LFS leaves in place of a large file
_FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them


def examine(name: str, *, trust_remote_code: bool = False) -> None:
    """Look at a model's config, and at its files where it is a folder, before anything is loaded.

    Raises:
        ModelError: it can't be loaded, or not be edited; says why.
        HyperParamsError: trust_remote_code is neither true nor false.
    """
    if not isinstance(trust_remote_code, bool):
        raise HyperParamsError(f"trust_remote_code is {trust_remote_code!r}; allowed: true, false.")
    folder = model_folder(name)
    config = _config_of_hub(name) if folder is None else _config_of_folder(folder)
    if any(part.get("quantization_config") or part.get("compression_config") for part in _parts(config)):
        raise ModelError(
            f"{name} is quantized ({_method(config)}), and edited weights have to be ordinary floating-point "
            "numbers. Load the model that it was made from."
        )
    kind, has_code = str(config.get("model_type") or ""), "auto_map" in config
    if not has_code and kind not in CONFIG_MAPPING:
        what = "without a model_type in its config.json"
        if kind:
            what = f"of type {kind!r}, which this version of transformers does not know"
        raise ModelError(f"{name} is {what}. Install a newer transformers, or give another model.")
    if not trust_remote_code and has_code and kind not in CONFIG_MAPPING:
        raise _needs_code(name)
    with reasons(f"The config.json of {name} can't be used", name, "Give another model, or mend it."):
        found = AutoConfig.from_pretrained(str(folder or name), trust_remote_code=trust_remote_code)
    if getattr(found, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} ({kind}) is an encoder-decoder, not a causal language model. "
            "Give a model that is a decoder alone."
        )
    own = config.get("auto_map") or {}
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own:
        raise ModelError(
            f"{name} ({kind}) is no causal language model. Give one that AutoModelForCausalLM loads."
        )
    if folder is not None:
        _refuse_damaged_weights(folder)


def model_folder(name: str) -> Path | None:
    """The folder of that name; None where it is a hub's.

    Raises:
        ModelError: it is a file, or reads like a path and there is no such folder.
    """
    if not isinstance(name, (str, Path)):
        raise ModelError(f"The model's name is a {type(name).__name__}, not a text. {_CURE}")
    path = user_path(name)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as exc:
        raise ModelError(f"No model can have the name {str(name)[:40]}…: {exc.strerror}. {_CURE}") from exc
    if is_folder:
        return path
    if is_file:
        raise ModelError(f"{path.absolute()} is a file. Give the folder that it lies in.")
    if str(name).startswith((".", "/", "~")):
        raise ModelError(f"There is no folder {path.absolute()}. {_CURE}")
    return None


def _config_of_folder(folder: Path) -> dict[str, Any]:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter (adapter_config.json), which is no model of its own. "
            "Merge it into its model (merge_and_unload), and give the folder where that was saved."
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder.absolute()} has no config.json, so it holds no model. {_CURE}")
    return _mapping(folder / "config.json")


def _config_of_hub(name: str) -> dict[str, Any]:
    with reasons(f"No model can be loaded from {name}", name):
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    return config


def _mapping(path: Path) -> dict[str, Any]:
    """What a JSON file of a model's folder holds."""
    refuse_pointer(path)
    try:
        found = json.loads(read_text(path, ModelError, "Copy or download the model again."))
    except (ValueError, RecursionError) as exc:
        raise ModelError(f"{path.absolute()} is no JSON: {exc}. Copy or download it again.") from exc
    if not isinstance(found, dict):
        raise ModelError(f"{path.absolute()} holds a {type(found).__name__}, not a mapping. {_AGAIN}")
    return found


def _parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """A config, and those within it (a text decoder's beside a vision tower)."""
    return [config, *(part for part in config.values() if isinstance(part, dict))]


def _method(config: dict[str, Any]) -> str:
    """Which way of quantizing a config names."""
    for part in _parts(config):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            return str(found.get("quant_method")) if isinstance(found, dict) else str(found)
    return ""


def _needs_code(name: str) -> ModelError:
    return ModelError(
        f"{name} needs Python code that comes with it (auto_map in its config), "
        "which is not run unless you allow it. "
        "Read that code; if you trust it: trust_remote_code=True in Python, "
        "in commands model.trust_remote_code=true (demo: trust_remote_code=true) or --trust-remote-code."
    )


def _refuse_damaged_weights(folder: Path) -> None:
    """See that every file of weights is there and whole, as far as that shows without reading it all."""
    first = next((file for file in _WEIGHTS if (folder / file).exists()), None)
    if first is None:
        return  # transformers says which files it looked for
    files = [first]
    if first.endswith(".index.json"):
        places = _mapping(folder / first).get("weight_map")
        if not isinstance(places, dict) or not places:
            raise ModelError(f"{(folder / first).absolute()} has no weight_map. Copy or download it again.")
        files = sorted({str(file) for file in places.values()})
    for file in files:
        path = folder / file
        if not path.is_file():
            raise ModelError(
                f"{folder.absolute()} lacks {file}, which {first} names. Copy or download that file."
            )
        refuse_pointer(path)
        if problem := _damage(path):
            raise ModelError(
                f"{path.absolute()} is cut off or damaged ({path.stat().st_size} bytes: {problem}). {_AGAIN}"
            )


def refuse_pointer(path: Path) -> None:
    if not path.is_file():
        return
    with path.open("rb") as file:
        is_pointer = file.read(len(_POINTER)) == _POINTER
    if is_pointer:
        raise ModelError(
            f"{path.absolute()} is a Git LFS pointer, not the file itself. Fetch it: git lfs pull."
        )


def _damage(path: Path) -> str:
    """What is wrong with a file of weights; '' if nothing shows."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                kinds = {
                    key: file.get_slice(key).get_dtype()
                    for key in file.keys()  # noqa: SIM118
                    if key.endswith(".weight")
                }
        except (SafetensorError, OSError, ValueError) as exc:
            return first_line(exc)
        whole = next((key for key, kind in kinds.items() if kind not in _FLOATS), None)
        if whole is not None:
            raise ModelError(
                f"{path.absolute()} is quantized: {whole} is of type {kinds[whole]}. "
                "Load the model that it was made from."
            )
        return ""
    with path.open("rb") as file:
        head = file.read(4)
    if not head:
        return "it is empty"
    return "its end is missing" if head.startswith(b"PK") and not zipfile.is_zipfile(path) else ""


@contextlib.contextmanager
def reasons(what: str, name: str, cure: str = _CURE, said: str = "") -> Iterator[None]:
    """Whatever is raised in the block becomes a `ModelError` that gives its first line, or what is `said`
    instead.
    """
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # transformers, tokenizers and a model's own code raise whatever they like
        if "trust_remote_code=True" in str(exc):
            raise _needs_code(name) from exc
        raise ModelError(f"{what}: {said or first_line(exc)} {cure}") from exc


def first_line(error: BaseException) -> str:
    """What an error says, in a line that ends as a sentence does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if said.endswith((".", "!", "?")) else f"{said}."
