"""How every command loads models and tokenizers: whole, in ordinary numbers, and without code that nobody
allowed.

What transformers lets pass with a warning (weights that are missing and so made up, a tokenizer without a
vocabulary) is refused, and what it fails at in many ways ends in one: a `ModelError` of a line.
"""

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from easyedit_rls.errors import HyperParamsError, ModelError, RLSEditWarning
from easyedit_rls.model.examine import examine, first_line, model_folder, reasons, refuse_pointer

DTYPES = ("float32", "bfloat16", "float16", "float64")

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
        str(model_folder(name) or name),
        {"gguf_file": gguf_file, "output_loading_info": True, "ignore_mismatched_sizes": True},
    )
    with reasons(f"No model can be loaded from {name}", name), _held_back():
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
            f"{name} can't be moved to {device}: {first_line(exc)} Give cpu, cuda, or cuda:1."
        ) from exc
    return placed


def load_tokenizer(
    name: str, *, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedTokenizerBase:
    """A fast tokenizer; see `load_model` and `load_weights`.

    Raises:
        ModelError: there is none, or only a slow one, or it has no vocabulary.
    """
    folder, said = model_folder(name), ""
    cure = "Put the tokenizer.json of the model's fast tokenizer there."
    if folder is not None:
        for file in ("tokenizer.json", "tokenizer.model"):
            refuse_pointer(folder / file)
        has_json, has_model = ((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model"))
        if not (gguf_file or has_json or has_model):
            said = "it has neither tokenizer.json nor tokenizer.model."
        elif has_model and not has_json:
            cure = f"It has a tokenizer.model alone. {cure}"
    settings = {"gguf_file": gguf_file} if gguf_file else {}
    with reasons(f"No fast tokenizer can be loaded from {name}", name, cure, said), _held_back():
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
