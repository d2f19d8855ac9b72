"""What several files here use: editors of one model, gated memories, a run of `easyedit-rls compare`."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from easyedit_rls import RLSEditor
from tests.conftest import FAMILIES, tiny_llama, tiny_settings

COMPARE_ARGUMENTS = [
    "alg_name=RLSEdit,RLSEdit--short",
    "settings.RLSEdit--short.v_num_grad_steps=2",
    "model.path=model",
    "model.hparams=tiny.yaml",
    "data.file=records.jsonl",
    "data.batch=2",
    "eval.every=1",
    "eval.text=text.txt",
    "eval.fluency=2",
    "threads=1",
    "out=out",
]


@pytest.fixture
def fresh(family, tok):
    """Makes an editor of the same unedited model, time and again."""

    def make(hp, state_dir=None, dtype=torch.float32, **how):
        return RLSEditor(FAMILIES[family]().to(dtype), tok, hp, state_dir=state_dir, **how)

    return make


@pytest.fixture
def few_ordinary_keys(monkeypatch):
    """A gate's threshold is the quantile of few keys: a test has no need of more."""
    monkeypatch.setattr("easyedit_rls.anchors.ordinary.N_KEYS", 4000)


@pytest.fixture
def gated(family):
    """Settings of a gated memory."""

    def make(**changes):
        return tiny_settings(family, memory="gated", gate_share=0.01, **changes)

    return make


@pytest.fixture
def logits(tok):
    """Logits that a model has for a text."""

    def of(model, text):
        with torch.no_grad():
            return model(**tok(text, return_tensors="pt")).logits

    return of


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tok, demo_text, requests):
    """A folder with a tiny model, its settings, records and a text."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_llama().save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings("llama").to_dict()))
    (folder / "text.txt").write_text(demo_text, encoding="utf-8")
    more = {
        "ground_truth": "stones",
        "rephrase_prompt": "It is",
        "locality_prompt": "The river Rhine",
        "locality_ground_truth": "flows",
    }
    records = [{**request, **more, "generation_prompts": ["The river"]} for request in requests]
    (folder / "records.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def compare_command(*changes):
    """`easyedit-rls compare` in `tiny_folder`."""
    return [sys.executable, "-m", "easyedit_rls.cli.main", "compare", *COMPARE_ARGUMENTS, *changes]


@pytest.fixture(scope="session")
def compared(tiny_folder):
    """The command, run once; its results are in `out`."""
    done = subprocess.run(compare_command(), cwd=tiny_folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done
