"""Wrong inputs: each ends in a typed error with the cure in Python, in one line and status 2 in a command.

Nothing is left behind. One table, `CASES`: a name, what makes a sound folder wrong, what uses it in Python,
the error and its message, and the command that meets the same. Each case has a folder of its own, with
`model` (a tiny Llama and its tokenizer), `short` (a tiny GPT-2 with few positions), `records.jsonl` and
`text.txt` in it.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from easyedit_rls import RLSEditor, evaluate, perplexity
from easyedit_rls._base.files import read_text
from easyedit_rls.anchors.cache import moments
from easyedit_rls.cli.main import main
from easyedit_rls.errors import ModelError, RequestError, RLSEditWarning
from easyedit_rls.evaluation import generate
from easyedit_rls.host.__main__ import main as host
from easyedit_rls.model.load import load_model
from tests.conftest import tiny_llama, tiny_settings
from tests.integration.wrong_arguments import ARGUMENTS
from tests.integration.wrong_inputs import (
    COMPARE,
    EDIT,
    FACT,
    INIT,
    LOCATE,
    LONG,
    NEW,
    POSITIONS,
    TUNE,
    changed,
    halved,
    short_gpt2,
    written,
)
from tests.integration.wrong_models import MODELS
from tests.integration.wrong_texts import TEXTS, with_new_token

CASES = [*MODELS, *TEXTS, *ARGUMENTS]


@pytest.fixture(scope="module")
def sound(tmp_path_factory, tok, demo_text):
    folder = tmp_path_factory.mktemp("sound")
    for name, model in (("model", tiny_llama()), ("short", short_gpt2())):
        model.save_pretrained(folder / name)
        tok.save_pretrained(folder / name)
    (folder / "records.jsonl").write_text(json.dumps(FACT))
    (folder / "text.txt").write_text(demo_text, encoding="utf-8")
    return folder


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks on stdin"))
    return tmp_path


@pytest.fixture(autouse=True)
def _loggers_as_before():
    """Hydra's setup of logging disables every logger there is,
    and the host's command sets the root's level.
    """
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    before = {
        logger: (logger.disabled, logger.level)
        for logger in root.manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
    }
    yield
    for logger, (is_disabled, own) in before.items():
        logger.disabled = is_disabled
        logger.setLevel(own)
    root.setLevel(level)
    root.handlers[:] = handlers


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def run(arguments: tuple[str, ...]) -> int | str | None:
    """Run a command in this process; its exit status."""
    try:
        return main(list(arguments)) if arguments[0] != "host" else host(list(arguments[1:]))
    except SystemExit as end:
        return end.code


def refused(capsys, arguments: tuple[str, ...], folder: Path) -> str:
    """Run a command that has to end with status 2, a line and no trace; returns the line."""
    before = tree(folder)
    capsys.readouterr()
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    bars = ("evaluating", "tuning")  # shown before the command comes to it
    lines = [line for line in re.split("[\r\n]+", err) if line and not line.startswith(bars)]
    assert len(lines) == 1, err
    assert lines[0].startswith("easyedit-rls: ")
    assert "Traceback" not in out
    assert tree(folder) == before
    return lines[0]


@pytest.mark.parametrize("case", [case for case in CASES if case.use], ids=lambda case: case.name)
def test_in_python(case, folder, tok):
    if case.spoil:
        case.spoil(folder)
    before = tree(folder)
    with pytest.raises(case.error, match=case.message) as caught:
        case.use(folder, tok)
    assert "\n" not in str(caught.value)
    if not case.use.__qualname__.startswith("with_token"):  # which makes its tokenizer there
        assert tree(folder) == before


@pytest.mark.parametrize("case", [case for case in CASES if case.command], ids=lambda case: case.name)
def test_on_the_command_line(case, folder, capsys):
    if case.spoil:
        case.spoil(folder)
    assert re.search(case.message, refused(capsys, case.command, folder))


COMMANDS = {
    "init": INIT,
    "tune": TUNE,
    "locate": LOCATE,
    "edit": EDIT,
    "compare": COMPARE,
    "demo": ("demo", "model=model", "hparams=null", "out=out"),
    "moments": ("host", "moments", "smollm2-135m", "--model", "./model", "--text", "self", "--dataset",
        "wiki", "--stats_dir", "stats"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_loads_a_model_refuses_a_damaged_one(command, folder, capsys):
    halved("model/model.safetensors")(folder)
    assert "model.safetensors is cut off or damaged" in refused(capsys, COMMANDS[command], folder)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_option_that_the_message_names(command, folder, capsys):
    changed(model_type="theirs", auto_map={"AutoConfig": "configuration_theirs.Theirs"})(folder)
    assert "trust_remote_code" in refused(capsys, COMMANDS[command], folder)
    option = {"edit": "model.trust_remote_code=true", "compare": "model.trust_remote_code=true",
        "demo": "trust_remote_code=true"}  # fmt: skip
    line = refused(capsys, (*COMMANDS[command], option.get(command, "--trust-remote-code")), folder)
    assert "configuration_theirs.py" in line  # which it now looks for


def test_the_demos_model_cut_off(folder, capsys, monkeypatch):
    (folder / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    monkeypatch.setattr("easyedit_rls.cli.demo_model.find_weights", lambda: folder / "cut.gguf")
    assert "No model can be loaded from" in refused(capsys, ("demo-model", "out=out"), folder)


def test_a_replay_into_a_damaged_model(folder, tok, capsys):
    model, _ = load_model(str(folder / "model"))
    with RLSEditor(model, tok, tiny_settings("llama"), state_dir=folder / "ledger") as editor:
        editor.edit(FACT)
    halved("model/model.safetensors")(folder)
    assert "is cut off or damaged" in refused(capsys, ("state", "replay", "ledger", "model", "out"), folder)
    changed(model_type="theirs", auto_map={"AutoConfig": "configuration_theirs.Theirs"})(folder)
    assert "--trust-remote-code" in refused(capsys, ("state", "replay", "ledger", "model", "out"), folder)
    line = refused(capsys, ("state", "replay", "ledger", "model", "out", "--trust-remote-code"), folder)
    assert "configuration_theirs.py" in line


def test_a_model_with_code_of_its_own_runs_where_that_is_allowed(folder):
    (folder / "model" / "theirs.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class TheirConfig(LlamaConfig):\n    model_type = 'theirs'\n\n\n"
        "class TheirModel(LlamaForCausalLM):\n    config_class = TheirConfig\n"
    )
    changed(
        model_type="theirs",
        auto_map={"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirModel"},
    )(folder)
    model, _ = load_model(str(folder / "model"), trust_remote_code=True)
    assert type(model).__name__ == "TheirModel"
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


def test_a_spare_token_does_no_harm(folder):
    """Tokenizers often have a pad token that the model lacks; it fills up rows that have ended, and must not
    run.
    """
    with_new_token(lambda folder: None)(folder)
    model, tok = load_model(str(folder / "model"))
    tok.pad_token = NEW
    assert tok.pad_token_id == 600
    model.generation_config.eos_token_id = list(range(300))  # texts end early, one before the other
    prompts = ["The river", "In the morning", "Some say", "Bread is made of"]
    together = generate(model, tok, prompts, max_new_tokens=12)
    assert together == [generate(model, tok, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    editor = RLSEditor(model, tok, tiny_settings("llama", mom2_dataset="self"))
    assert editor.edit(FACT).n_edits == 1
    tok.add_tokens(["<another>"])
    assert moments(model, tok, tiny_settings("llama", mom2_dataset="self", mom2_n_samples=64))


def test_texts_as_long_as_the_table_are_taken(tok):
    """The last token of an answer is predicted, not run."""
    model = short_gpt2()
    words = tok.decode(tok(LONG, add_special_tokens=False)["input_ids"][: POSITIONS - 1])
    for text, answer in ((words, " of the"), (words, " of")):
        n = len(tok(text + answer, add_special_tokens=False)["input_ids"])
        record = {"prompt": text, "subject": "weather", "target_new": answer.strip()}
        if n - 1 > POSITIONS:
            with pytest.raises(RequestError, match="positions"):
                evaluate(model, tok, record)
        else:
            evaluate(model, tok, record)
    assert generate(model, tok, [words], max_new_tokens=2)
    assert perplexity(model, tok, LONG, window=POSITIONS) > 0


def test_a_byte_order_mark_is_no_text(folder):
    written("text.txt", b"\xef\xbb\xbfThe river.\r\nThe lake.\n")(folder)
    assert read_text(folder / "text.txt") == "The river.\nThe lake.\n"


def test_integers_that_pass_for_weights_are_refused(folder):
    """A checkpoint of whole numbers without a word of it in its config: transformers would cast them."""
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.ones(32, 48, dtype=torch.int8)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"is quantized: model.layers.0.mlp.down_proj.weight is of type I8"):
        load_model(str(folder / "model"))


def test_layers_that_a_config_leaves_out_are_told(folder):
    changed(num_hidden_layers=2)(folder)
    with pytest.warns(RLSEditWarning, match=r"holds weights that its model does not use: model.layers.2"):
        load_model(str(folder / "model"))
