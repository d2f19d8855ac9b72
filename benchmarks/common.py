"""What the benchmarks share: options, records and models, and what every output says: spreads, versions and
the machine.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import easyedit_rls
from easyedit_rls import RLSEditHyperParams
from easyedit_rls.cli.loading import settings_for
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from easyedit_rls.solvers.spd import inverse_factor

_LONGEST = 2000  # characters of a line of results

_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {"required": True, "help": "folder or hub name of the model"},
    "data": {"type": Path, "required": True, "help": "records in CounterFact's JSON format"},
    "text": {"type": Path, "required": True, "help": "plain text for perplexity"},
    "hparams": {
        "default": "smollm2-135m",
        "help": "YAML file, shipped name, or init: made from the model (default: %(default)s)",
    },
    "set": {
        "action": "append",
        "default": [],
        "metavar": "NAME=VALUE",
        "help": "override a setting; may be repeated",
    },
    "layers": {"type": int, "nargs": "+", "help": "edited layers (default: those of the settings)"},
    "first": {"type": int, "default": 2000, "help": "first record (default: %(default)s)"},
    "count": {"type": int, "default": 40, "help": "number of records (default: %(default)s)"},
    "batch": {"type": int, "default": 10, "help": "edits a batch (default: %(default)s)"},
    "device": {"default": "cpu", "help": "cpu, cuda, cuda:1, … (default: %(default)s)"},
    "threads": {"type": int, "default": 1, "help": "default: %(default)s"},
}


def parser(doc: str | None, *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with these options, of those that several benchmarks have; defaults other than the usual by
    name (None: not required).
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        option = dict(_OPTIONS[name])
        if name in defaults:
            option.pop("required", None)
            option["default"] = defaults[name]
        made.add_argument(f"--{name}", **option)
    return made


def records_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """`--count` records of `--data` from `--first` on."""
    found: list[dict[str, Any]] = json.loads(args.data.read_text(encoding="utf-8"))
    return found[args.first : args.first + args.count]


def settings_of(
    args: argparse.Namespace, model: Any, changes: Mapping[str, Any] | None = None
) -> RLSEditHyperParams:
    """`--hparams`, with these changes and what `--set` overrides; refused where they are another model's."""
    overrides = OmegaConf.to_container(OmegaConf.from_dotlist(getattr(args, "set", [])))
    assert isinstance(overrides, dict)
    hparams = None if args.hparams == "init" else args.hparams
    return settings_for(model, args.model, hparams, {**(changes or {}), **overrides})


def load(folder: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Any, Any]:
    """A model and its tokenizer."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(
        device
    ).eval(), AutoTokenizer.from_pretrained(folder)


def gate_factors(start: RecursiveLeastSquares, now: RecursiveLeastSquares, prior: float) -> Tensor:
    """What a gate goes by (`Decision.factors`), from a layer's states before the first edit and now."""
    A_0 = start.information()
    halves = (prior * A_0, now.information() - (1 - prior) * A_0)
    return torch.cat([inverse_factor(half) for half in halves], 1).float()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def versions() -> dict[str, str]:
    """Of the package and of what it computes with."""
    return {
        "easyedit_rls": easyedit_rls.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict[str, object]:
    """Where it ran."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": platform.machine(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }


def as_json(value: Any, depth: int = 2, indent: str = "") -> str:
    """JSON for people and for diffs: a line for each key of the outermost mappings and each item of their
    lists. Whatever holds numbers and texts alone is on one line; so is, up to a length, all that lies deeper.
    """
    line = json.dumps(value, ensure_ascii=False)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    parts = [part for item in items for part in (item if isinstance(item, list) else [item])]
    is_nested = any(isinstance(part, (dict, list)) for part in parts)
    if not is_nested or (depth <= 0 and len(line) < _LONGEST):
        return line
    deeper = indent + " "
    names = [f"{json.dumps(key)}: " for key in value] if isinstance(value, dict) else [""] * len(value)
    lines = [name + as_json(item, depth - 1 if name else 0, deeper) for name, item in zip(names, items)]
    first, last = "{}" if isinstance(value, dict) else "[]"
    return f"{first}\n{deeper}" + f",\n{deeper}".join(lines) + f"\n{indent}{last}"
