"""Wrong texts: longer than a model's positions, with tokens that it lacks, or in files that are no UTF-8."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from easyedit_rls import RLSEditor, evaluate, perplexity
from easyedit_rls._base.files import read_text
from easyedit_rls.anchors.cache import moments
from easyedit_rls.anchors.pairs import anchor_pairs
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.errors import AnchorError, ModelError, RequestError, TextError
from easyedit_rls.evaluation import answers, edit_quality, generate
from easyedit_rls.model.load import load_model
from easyedit_rls.tuning.trace import trace
from tests.conftest import tiny_llama, tiny_settings
from tests.integration.wrong_inputs import (
    COMPARE,
    EDIT,
    FACT,
    LATIN,
    LOCATE,
    LONG,
    NEW,
    POSITIONS,
    TUNE,
    Wrong,
    short_gpt2,
    written,
)


def records(*facts: dict[str, Any], model: str = "short") -> Callable[[Path], Any]:
    """Other records, and another model in the place of the usual one."""

    def spoil(folder: Path) -> None:
        (folder / "records.jsonl").write_text("\n".join(json.dumps(fact) for fact in facts))
        if model != "model":
            shutil.rmtree(folder / "model")
            shutil.copytree(folder / model, folder / "model")

    return spoil


def with_new_token(then: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """A tokenizer that has a token more than the model."""

    def spoil(folder: Path) -> None:
        then(folder)
        path = folder / "model" / "tokenizer.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        last = {**content["added_tokens"][-1], "id": 600, "content": NEW}
        path.write_text(
            json.dumps({**content, "added_tokens": [*content["added_tokens"], last]}), encoding="utf-8"
        )

    return spoil


def short(use: Callable[[Any, Any], Any]) -> Callable[[Path, Any], Any]:
    """Use a model with few positions."""
    return lambda folder, tok: use(short_gpt2(), tok)


def edit_with(long: str = "", **changes: Any) -> Callable[[Path, Any], Any]:
    """Edit two facts, of which the second is long or the templates are;
    the first must not be edited either.
    """

    def use(folder: Path, tok: Any) -> None:
        model, settings = short_gpt2(), tiny_settings("gpt2", **changes)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        editor = RLSEditor(model, tok, settings)
        try:
            editor.edit([FACT, {**FACT, "prompt": long + "Some say {} has", "subject": "rye"}])
        finally:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert not editor.state.layers

    return use


def with_token(use: Callable[[Any, Any], Any]) -> Callable[[Path, Any], Any]:
    """Use a tokenizer that has a token more than the model."""

    def used(folder: Path, tok: Any) -> None:
        with_new_token(lambda folder: None)(folder)
        model, known = load_model(str(folder / "model"))
        assert len(known) == 601
        use(model, known)

    return used


def read(name: str) -> Callable[[Path, Any], Any]:
    return lambda folder, tok: read_text(folder / name)


def sampled_from(name: str) -> Callable[[Path, Any], Any]:
    return lambda folder, tok: moments(
        tiny_llama(), tok, tiny_settings("llama", mom2_dataset=str(folder / name))
    )


TOO_LONG = rf"has \d+ tokens, but the model has {POSITIONS} positions\. Shorten"
UNKNOWN = (
    rf"Token '{NEW}'.* has id 600, but the model's embedding has 600 rows\. "
    r"Call model.resize_token_embeddings"
)
LONG_FACT = {**FACT, "prompt": LONG + "The river Oder"}
NEW_FACT = {**FACT, "prompt": f"The {NEW} river Oder"}
REPHRASED = {**FACT, "rephrase_prompt": LONG}
NEAR = {**FACT, "locality": {"others": {"prompt": LONG, "ground_truth": "water"}}}

TEXTS = [
    # Texts longer than the model's table of positions.
    Wrong("a long prompt", records(FACT, LONG_FACT), edit_with(long=LONG), RequestError,
        f"Request 1: .*{TOO_LONG}", EDIT),
    Wrong("long templates", records(FACT), edit_with(context_templates=[LONG]), RequestError,
        f"text before it {TOO_LONG} the prompt, or context_templates",
        (*EDIT, f"settings.context_templates=['{LONG}']")),
    Wrong("a long prompt to compare on", records(FACT, LONG_FACT),
        short(lambda model, tok: evaluate(model, tok, [FACT, LONG_FACT])), RequestError,
        f"Request 1: The prompt with its .*{TOO_LONG}", COMPARE),
    Wrong("a long paraphrase", records(FACT, REPHRASED),
        short(lambda model, tok: evaluate(model, tok, [FACT, FACT, REPHRASED])), RequestError,
        rf"Request [12]: The prompt with its answer {TOO_LONG}", EDIT),
    Wrong("a long neighbor", records(NEAR), short(lambda model, tok: evaluate(model, tok, NEAR)),
        RequestError, f"Request 0: .*{TOO_LONG}", COMPARE),
    Wrong("EasyEdit's figures", None, short(lambda m, t: edit_quality(m, t, [FACT, REPHRASED])), RequestError,
        f"Request 1: .*{TOO_LONG}"),
    Wrong("too much to write", None, short(lambda model, tok: generate(model, tok, ["The river", "The"],
        max_new_tokens=POSITIONS - 1)), RequestError,
        f"Request 0: The prompt with the {POSITIONS - 1} tokens to be written "
        f"{TOO_LONG} it, or lower max_new_tokens"),
    Wrong("a long question", None, short(lambda m, t: answers(m, t, [LONG], ["a"])), RequestError,
        f"Request 0: .*{TOO_LONG}"),
    Wrong("a long prompt to trace", records(FACT, LONG_FACT),
        short(lambda model, tok: trace(model, tok, parse_requests([FACT, LONG_FACT]))), RequestError,
        f"Request 1: .*{TOO_LONG}", LOCATE),
    Wrong("a wide window", None, short(lambda model, tok: perplexity(model, tok, LONG, window=POSITIONS + 1)),
        RequestError,
        rf"field 'window': is {POSITIONS + 1}, but the model has positions for {POSITIONS} tokens"),
    Wrong("a long anchor", None, short(lambda model, tok: anchor_pairs(model, tok, tiny_settings("gpt2"),
        ["The", LONG])), AnchorError, f"Anchor prompt 1: .*{TOO_LONG}"),
    # Tokens that the model has no row for.
    Wrong("an unknown token in a fact", with_new_token(records(FACT, NEW_FACT, model="model")),
        with_token(lambda model, tok: RLSEditor(model, tok, tiny_settings("llama")).edit([FACT, NEW_FACT])),
        ModelError, f"Token '{NEW}' of request 1 has id 600", EDIT),
    Wrong("an unknown token to compare on", with_new_token(records(NEW_FACT, model="model")),
        with_token(lambda model, tok: evaluate(model, tok, NEW_FACT)), ModelError, UNKNOWN, COMPARE),
    Wrong("an unknown token to trace", with_new_token(records(NEW_FACT, model="model")),
        with_token(lambda model, tok: trace(model, tok, parse_requests(NEW_FACT))), ModelError, UNKNOWN,
        LOCATE),
    Wrong("... to go on from", None, with_token(lambda m, t: generate(m, t, [f"A {NEW}"], max_new_tokens=2)),
        ModelError, UNKNOWN),
    Wrong("... in EasyEdit's figures", None, with_token(lambda m, t: edit_quality(m, t, [NEW_FACT])),
        ModelError, UNKNOWN),
    Wrong("... in a text", None, with_token(lambda m, t: perplexity(m, t, f"A {NEW} river")), ModelError,
        UNKNOWN),
    Wrong("... in an anchor", None, with_token(lambda m, t: anchor_pairs(m, t, tiny_settings("llama"),
        [NEW])), ModelError, UNKNOWN),
    # Text files.
    Wrong("moments' text in Latin-1", written("text.txt", LATIN), sampled_from("text.txt"), AnchorError,
        r"text.txt is not UTF-8 text: byte 6 is 0xfc\. Save it as UTF-8",
        (*EDIT, "settings.mom2_dataset=text.txt")),
    Wrong("moments' text that is a folder", lambda folder: (folder / "folder.txt").mkdir(),
        sampled_from("folder.txt"), AnchorError, "folder.txt is a folder, not a file. Change mom2_dataset",
        (*EDIT, "settings.mom2_dataset=folder.txt")),
    Wrong("moments' text that is empty", written("text.txt", " \n"), sampled_from("text.txt"), AnchorError,
        "text.txt has no text: it is empty. Change mom2_dataset", (*EDIT, "settings.mom2_dataset=text.txt")),
    Wrong("a text behind a mark", written("text.txt", b"\xef\xbb\xbf" + LATIN), read("text.txt"), TextError,
        r"not UTF-8 text: byte 9 is 0xfc", (*COMPARE, "eval.text=text.txt")),
    Wrong("a demo's text in Latin-1", written("text.txt", LATIN), read("text.txt"), TextError,
        "text.txt is not UTF-8 text", ("demo", "model=model", "hparams=null", "text=text.txt", "out=out")),
    Wrong("a text that is a folder", None, read("model"), TextError, "is a folder, not a file",
        (*TUNE, "--text", "model")),
    Wrong("a text that is missing", None, read("none.txt"), TextError, "none.txt can't be read: No such",
        (*TUNE, "--text", "none.txt")),
    Wrong("an empty text", written("text.txt", ""), read("text.txt"), TextError, "has no text: it is",
        (*TUNE, "--text", "text.txt")),
    Wrong("a name that is none", None, read("a\0b"), TextError, "can't be read: .*null"),
]  # fmt: skip
