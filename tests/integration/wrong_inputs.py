"""What a wrong input is, and how a sound folder is made wrong; `wrong_models.py`, `wrong_texts.py` and
`wrong_arguments.py` list them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2LMHeadModel

from easyedit_rls.model.load import load_model
from tests.conftest import tiny_gpt2

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
POSITIONS = 40
LONG = "The weather was fine, and in the morning we met the people of the river. " * 6
FACT = {"prompt": "The river Oder", "subject": "Oder", "target_new": "people", "ground_truth": "stones"}
NEW = "<brandnew>"  # a token that some tokenizers below have, and no model
LATIN = "Die Flüsse führen Wasser.\n".encode("latin-1")
INIT = ("init", "model", "--no-trial", "--out", "made.yaml")
EDIT = ("edit", "model.path=model", "data.file=records.jsonl", "out=out", "state_dir=ledger")
COMPARE = ("compare", "model.path=model", "data.file=records.jsonl", "out=out")
TUNE = ("tune", "model", "--data", "records.jsonl", "--out", "out")
LOCATE = ("locate", "model", "--data", "records.jsonl", "--out", "out")


@dataclass(frozen=True)
class Wrong:
    """A wrong input.

    Attributes:
        name: of the case.
        spoil: makes a sound folder wrong; None where the arguments are.
        use: what fails in Python, given the folder and a tokenizer; None where only a command can.
        error: what it raises.
        message: a regular expression of its message.
        command: what fails on the command line, in that folder; None where only Python can.
    """

    name: str
    spoil: Callable[[Path], Any] | None
    use: Callable[[Path, Any], Any] | None
    error: type[Exception]
    message: str
    command: tuple[str, ...] | None = None


def load(folder: Path, tok: Any) -> Any:
    """Load the folder's model as every command does."""
    return load_model(str(folder / "model"))


def changed(**values: Any) -> Callable[[Path], Any]:
    """Settings of the model's config.json; None takes one out."""

    def spoil(folder: Path) -> None:
        path = folder / "model" / "config.json"
        config = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

    return spoil


def written(name: str, content: str | bytes) -> Callable[[Path], Any]:
    """A file with this content."""
    return lambda folder: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


def halved(name: str) -> Callable[[Path], Any]:
    """The first half of a file."""
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def removed(*names: str) -> Callable[[Path], Any]:
    """Without these files."""
    return lambda folder: [(folder / name).unlink() for name in names]


def short_gpt2(n_positions: int = POSITIONS) -> GPT2LMHeadModel:
    config = tiny_gpt2().config
    config.n_positions = n_positions
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).eval()
