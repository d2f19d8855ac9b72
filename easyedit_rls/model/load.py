"""How every command loads models and tokenizers: whole, in ordinary numbers, and without code that nobody
allowed.

What transformers lets pass with a warning (weights that are missing and so made up, a tokenizer without a
vocabulary) is refused, and what it fails at in many ways ends in one: a `ModelError` of a line.
"""

import contextlib
import json
import logging
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from easyedit_rls._base.files import read_text, user_path
from easyedit_rls.errors import HyperParamsError, ModelError, RLSEditWarning

DTYPES = ("float32", "bfloat16", "float16", "float64")

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
_NAMES = 3  # of missing weights that a message lists


def load_model(
    name: str, dtype: str = "float32", device: str = "cpu", *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in evaluation mode, and its fast tokenizer.

    Args:
        name: folder or hub name.
        dtype: one of `DTYPES`.
        device: where the model goes; see `devices.choose_device`.
        trust_remote_code: run Python code that comes with the model (`auto_map`). Nobody is asked: without
            it, such a model is refused.

    Raises:
        ModelError: there is no such model, its files are damaged or incomplete, or it is of a kind that can't
            be edited.
        HyperParamsError: no such dtype.
    """
    check_dtype(dtype)
    examine(name, trust_remote_code=trust_remote_code)
    tok = load_tokenizer(name, trust_remote_code=trust_remote_code)  # before the weights, which take longer
    return _load_weights(name, dtype, device, trust_remote_code), tok


def load_weights(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """The model without a tokenizer; see `load_model`.

    Args:
        name, dtype, device, trust_remote_code: see `load_model`.
        gguf_file: a file of the folder to read instead of those that save_pretrained writes.
    """
    check_dtype(dtype)
    if gguf_file is None:
        examine(name, trust_remote_code=trust_remote_code)
    return _load_weights(name, dtype, device, trust_remote_code, gguf_file)


def _load_weights(
    name: str, dtype: str, device: str, trust: bool, gguf_file: str | None = None
) -> PreTrainedModel:
    """The model of a name that was looked at."""
    place, settings = (
        str(_folder(name) or name),
        {"gguf_file": gguf_file, "output_loading_info": True, "ignore_mismatched_sizes": True},
    )
    with _reasons(f"No model can be loaded from {name}", name), _held_back():
        model, found = AutoModelForCausalLM.from_pretrained(
            place, dtype=getattr(torch, dtype), trust_remote_code=trust, **settings
        )
        _refuse_made_up(name, found)
        _warn_of_unused(name, found)
        if getattr(model, "peft_config", None):
            raise ModelError(
                f"{name} is an adapter, not a model. Merge it into its model (merge_and_unload), "
                "and save that."
            )
    try:
        placed: PreTrainedModel = model.to(device).eval()
    except torch.OutOfMemoryError as exc:
        cure = "Take a smaller dtype, or another device."
        raise ModelError(f"{name} in {dtype} does not fit into the memory of {device}. {cure}") from exc
    except RuntimeError as exc:
        raise ModelError(
            f"{name} can't be moved to {device}: {_first_line(exc)} Give cpu, cuda, or cuda:1."
        ) from exc
    return placed


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """A fast tokenizer; see `load_model` and `load_weights`.

    Raises:
        ModelError: there is none, or only a slow one, or it has no vocabulary.
    """
    folder, said = _folder(name), ""
    cure = "Put the tokenizer.json of the model's fast tokenizer there."
    if folder is not None:
        for file in ("tokenizer.json", "tokenizer.model"):
            _refuse_pointer(folder / file)
        has_json, has_model = ((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
        if not (gguf_file or has_json or has_model):
            said = "it has neither tokenizer.json nor tokenizer.model."
        elif has_model and not has_json:
            cure = f"It has a tokenizer.model alone. {cure}"
    settings = {"gguf_file": gguf_file} if gguf_file else {}
    with _reasons(f"No fast tokenizer can be loaded from {name}", name, cure, said), _held_back():
        tok: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder or name), trust_remote_code=trust_remote_code, **settings
        )
    if not tok.is_fast:
        kind = type(tok).__name__
        raise ModelError(
            f"The tokenizer of {name} is a slow one ({kind}), which gives no character offsets. {cure}"
        )
    if set(tok.get_vocab()) <= {*tok.get_added_vocab(), *tok.all_special_tokens}:
        raise ModelError(f"{name} has no tokenizer: {type(tok).__name__} finds no vocabulary there. {cure}")
    return tok


def check_dtype(dtype: str) -> None:
    """See that a dtype is one of `DTYPES`.

    Raises:
        HyperParamsError: it is not; lists them.
    """
    if dtype not in DTYPES:
        raise HyperParamsError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")


def examine(name: str, *, trust_remote_code: bool = False) -> None:
    """Look at a model's config, and at its files where it is a folder, before anything is loaded.

    Raises:
        ModelError: it can't be loaded, or not be edited; says why.
        HyperParamsError: trust_remote_code is neither true nor false.
    """
    if not isinstance(trust_remote_code, bool):
        raise HyperParamsError(f"trust_remote_code is {trust_remote_code!r}; allowed: true, false.")
    folder = _folder(name)
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
    with _reasons(f"The config.json of {name} can't be used", name, "Give another model, or mend it."):
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


def _folder(name: str) -> Path | None:
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
    with _reasons(f"No model can be loaded from {name}", name):
        config: dict[str, Any] = PreTrainedConfig.get_config_dict(name)[0]
    return config


def _mapping(path: Path) -> dict[str, Any]:
    """What a JSON file of a model's folder holds."""
    _refuse_pointer(path)
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


def _warn_of_unused(name: str, found: Mapping[str, Any]) -> None:
    """Weights that the files have and the model does not: all is well with some, not with a layer's."""
    if names := sorted(found["unexpected_keys"]):
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        shown = ", ".join(names[:_NAMES])
        warnings.warn(
            f"{name} holds weights that its model does not use: {shown}{more}. Check its config.json.",
            RLSEditWarning,
            stacklevel=4,
        )


def _refuse_made_up(name: str, found: Mapping[str, Any]) -> None:
    """Weights that the files don't have, or have in another shape, transformers draws at random."""
    unlike = [
        f"{key} ({' × '.join(map(str, was))} for {' × '.join(map(str, wanted))})"
        for key, was, wanted in found["mismatched_keys"]
    ]
    for what, names in (
        ("lacks weights of its model", found["missing_keys"]),
        ("has weights of other shapes than its config", unlike),
    ):
        if names:
            more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
            raise ModelError(
                f"{name} {what}: {', '.join(sorted(names)[:_NAMES])}{more}. Copy or download it again, "
                "or save it as a causal language model."
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
        _refuse_pointer(path)
        if problem := _damage(path):
            raise ModelError(
                f"{path.absolute()} is cut off or damaged ({path.stat().st_size} bytes: {problem}). {_AGAIN}"
            )


def _refuse_pointer(path: Path) -> None:
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
            return _first_line(exc)
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
def _reasons(what: str, name: str, cure: str = _CURE, said: str = "") -> Iterator[None]:
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
        raise ModelError(f"{what}: {said or _first_line(exc)} {cure}") from exc


def _first_line(error: BaseException) -> str:
    """What an error says, in a line that ends as a sentence does."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return said if said.endswith((".", "!", "?")) else f"{said}."


@contextlib.contextmanager
def _held_back() -> Iterator[None]:
    """What transformers logs in the block is shown when it went well; otherwise the error says what there is
    to say.

    Its bars are shown on a terminal only, as ours are.
    """
    records: list[tuple[logging.Handler, logging.LogRecord]] = []
    handlers = list(transformers_logging.get_logger().handlers)
    keepers = []
    has_bars = transformers_logging.is_progress_bar_enabled()

    def keeper(handler: logging.Handler) -> Any:
        def keep(record: logging.LogRecord) -> bool:
            records.append((handler, record))
            return False

        return keep

    try:
        for handler in handlers:
            keepers.append((handler, keeper(handler)))
            handler.addFilter(keepers[-1][1])
        if not sys.stderr.isatty():
            transformers_logging.disable_progress_bar()
        yield
    except BaseException:
        records.clear()
        raise
    finally:
        for handler, keep in keepers:
            handler.removeFilter(keep)
        if has_bars:
            transformers_logging.enable_progress_bar()
        for handler, record in records:
            handler.handle(record)
