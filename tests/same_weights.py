"""Whether a change of the code has changed a weight: hashes of streams of edits, and ledgers that the code
before it wrote.

    python -m tests.same_weights record FOLDER [--smollm2 MODEL]     # with the code before the change
    python -m tests.same_weights check FOLDER [--smollm2 MODEL]      # with the code behind it

`record` runs the streams and keeps their ledgers in FOLDER, with hashes.json: SHA-256 of each model's edited
weights behind each batch. `check` runs them again, and resumes a copy of each ledger; it tells what differs,
and ends with 1 if anything does. Hashes hold on one machine, with one torch.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls import RLSEditHyperParams, RLSEditor
from tests import zoo
from tests.conftest import FACTS, shipped_text, tiny_settings, tiny_tokenizer
from tests.helpers import FADING

FAMILIES = ("llama", "gpt2", "gemma2")
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {},
    "forgetting": FADING[0.9],
    "adaptive": FADING["adaptive"],
    "each": {"keys": "each"},
    "rehearsal": {"rehearsal": 3},
    "retraction": {},
    "published": {"targets": "published", "value_at": "hidden"},
    "sampled": {"context_templates": None, "n_templates": 2, "mom2_dataset": "self"},
    "low": {"v_dtype": "bfloat16"},
}
_NAMES = ("Elbe", "Rhine", "Danube", "Loire", "Tagus", "Po")


def streams() -> Iterator[tuple[str, Callable[[], PreTrainedModel], RLSEditHyperParams, str]]:
    """(name, the unedited model, settings, variant) of each stream of tiny models."""
    own = {
        key: value
        for key, value in tiny_settings("llama").to_dict().items()
        if not key.endswith(("_tmp", "_module", "model_name"))
    }
    for family in FAMILIES:
        for variant, changes in VARIANTS.items():
            dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
            make = _maker(family, dtype)
            given = {**own, "v_num_grad_steps": 6, "value_at": None, **changes}
            yield f"{family}-{variant}", make, RLSEditHyperParams.for_model(make(), **given), variant


def _maker(family: str, dtype: torch.dtype) -> Callable[[], PreTrainedModel]:
    return lambda: zoo.make(family).to(dtype)


def batches() -> list[list[dict[str, Any]]]:
    """Five batches: the tests' facts, and others that are like them."""
    more = [
        {"prompt": f"The river {name}", "subject": name, "target_new": target}
        for name, target in zip(_NAMES, ("well", "water") * 3)
    ]
    return [FACTS[:2], FACTS[2:], more[:2], more[2:4], [more[4], {**FACTS[0], "target_new": "water"}]]


def run(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    hparams: RLSEditHyperParams,
    variant: str,
    ledger: Path,
) -> list[str]:
    """Edit the stream with a ledger; hashes behind each change."""
    hashes = []
    with RLSEditor(model, tok, hparams, state_dir=ledger, show_progress=False) as editor:
        for number, batch in enumerate(batches()):
            editor.edit(batch)
            hashes.append(digest(editor))
            if variant == "retraction" and number in (1, 3):
                editor.retract([number])
                hashes.append(digest(editor))
    return hashes


def resumed(
    model: PreTrainedModel, tok: PreTrainedTokenizerBase, hparams: RLSEditHyperParams, ledger: Path
) -> list[str]:
    """The weights that a ledger gives an unedited model, and those behind a further batch."""
    with RLSEditor(model, tok, hparams, state_dir=ledger, show_progress=False) as editor:
        first = digest(editor)
        editor.edit([{"prompt": "Some say the Seine has", "subject": "Seine", "target_new": "people"}])
        return [first, digest(editor)]


def digest(editor: RLSEditor) -> str:
    """SHA-256 of the edited weights, as the model holds them."""
    found = hashlib.sha256()
    for layer in sorted(editor.layout.edited):
        weight = editor.layout.edited[layer].parameter.detach().contiguous()
        found.update(weight.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def smollm2(folder: str) -> list[str]:
    """The first two batches of the demo."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tok = AutoTokenizer.from_pretrained(folder)
    facts = json.loads(
        (Path(__file__).parents[1] / "easyedit_rls" / "data" / "demo_facts.json").read_text(encoding="utf-8")
    )
    editor, hashes = (
        RLSEditor(model, tok, RLSEditHyperParams.from_hparams("smollm2-135m"), show_progress=False),
        [],
    )
    for at in (0, 16):
        editor.edit(facts[at : at + 16])
        hashes.append(digest(editor))
    return hashes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("record", "check"))
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--smollm2", metavar="MODEL", help="folder of SmolLM2-135M, for the demo's first two batches"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["EASYEDIT_RLS_CACHE"] = tempfile.mkdtemp()
    tok, hashes, known, at = tiny_tokenizer(shipped_text()), {}, {}, arguments.folder / "hashes.json"
    if arguments.task == "check":
        known = json.loads(at.read_text(encoding="utf-8"))
    for name, make, hparams, variant in streams():
        ledger = Path(tempfile.mkdtemp()) if known else arguments.folder / name
        hashes[name] = run(make(), tok, hparams, variant, ledger)
        copied = Path(tempfile.mkdtemp()) / name
        shutil.copytree(arguments.folder / name, copied)
        hashes[f"{name}, resumed"] = resumed(make(), tok, hparams, copied)
    if arguments.smollm2:
        hashes["demo"] = smollm2(arguments.smollm2)
    if not known:
        at.write_text(json.dumps(hashes, indent=1), encoding="utf-8")
    unlike = [name for name, found in hashes.items() if known and known.get(name) != found]
    sys.stdout.write(
        f"{len(hashes)} streams and ledgers; "
        f"{'other weights: ' + ', '.join(unlike) if unlike else 'all alike'}\n"
    )
    sys.exit(1 if unlike else 0)


if __name__ == "__main__":
    main()
