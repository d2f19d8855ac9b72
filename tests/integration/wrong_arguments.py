"""Arguments that could be taken for something else: one text for its letters, a word for a name, a number for
none.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, perplexity
from easyedit_rls.anchors.pairs import anchor_pairs
from easyedit_rls.data.records import read_records
from easyedit_rls.errors import ArgumentError, HyperParamsError, InputError, LayoutError, RequestError
from easyedit_rls.evaluation import answers, consistency, edit_quality, fluency, generate
from tests.conftest import tiny_llama, tiny_settings
from tests.integration.wrong_inputs import COMPARE, EDIT, FACT, LOCATE, TUNE, Wrong, written


def on(use: Callable[[Any, Any, Any], Any], **changes: Any) -> Callable[[Path, Any], Any]:
    """Use a tiny model, its tokenizer and settings."""
    return lambda folder, tok: use(tiny_llama(), tok, tiny_settings("llama", **changes))


def edited(use: Callable[[RLSEditor], Any]) -> Callable[[Path, Any], Any]:
    """Use an editor that has made an edit, which has to stay."""

    def run(folder: Path, tok: Any) -> None:
        editor = RLSEditor(tiny_llama(), tok, tiny_settings("llama", v_num_grad_steps=2))
        editor.edit([FACT, {**FACT, "prompt": "Some say {} has", "subject": "rye"}])
        try:
            use(editor)
        finally:
            assert editor.n_edits == 2

    return run


def settings(**changes: Any) -> Callable[[Path, Any], Any]:
    """Settings made by hand, with these changes."""
    return lambda folder, tok: RLSEditHyperParams(**{**tiny_settings("llama").to_dict(), **changes})


def case(
    name: str,
    use: Callable[[Path, Any], Any] | None,
    error: type[Exception],
    message: str,
    *command: str,
    spoil: Callable[[Path], Any] | None = None,
) -> Wrong:
    return Wrong(name, spoil, use, error, message, command or None)


_ONE_TEXT = "is a str, not a list of texts. Put it into brackets"
_HALF = '{"prompt": "The river Oder", "subject": "Oder", "target_new": "\\ud800x"}'
_CONTRARY = "\n".join(json.dumps({**FACT, "target_new": target}) for target in ("people", "lakes"))
_BAD = '{"prompt": "The river Oder", "subject": "Elbe", "target_new": "people"}\n{"prompt": 3}\n'

ARGUMENTS = [
    case("one text as anchors", on(lambda m, t, hp: RLSEditor(m, t, hp, anchors="The river")), ArgumentError,
        f"anchors {_ONE_TEXT}"),
    case("one text as anchor pairs", on(lambda m, t, hp: anchor_pairs(m, t, hp, "The river")), ArgumentError,
        f"prompts {_ONE_TEXT}"),
    case("one text to go on from", on(lambda m, t, hp: generate(m, t, "The river", max_new_tokens=2)),
        ArgumentError, f"prompts {_ONE_TEXT}"),
    case("one text as answers", on(lambda m, t, hp: answers(m, t, ["The river"], "people")), ArgumentError,
        f"wanted {_ONE_TEXT}"),
    case("one text's fluency", lambda folder, tok: fluency("The river flows."), ArgumentError,
        f"texts {_ONE_TEXT}"),
    case("one reference", lambda folder, tok: consistency(["The river."], "The lake."), ArgumentError,
        f"references {_ONE_TEXT}"),
    case("a list of texts for one", on(lambda m, t, hp: perplexity(m, t, ["The river"])), ArgumentError,
        "text is a list, not a text"),
    case("a text as records", on(lambda m, t, hp: evaluate(m, t, "The river")), ArgumentError,
        "requests is a str, not a list"),
    case("one record for a list", on(lambda m, t, hp: edit_quality(m, t, FACT)), ArgumentError,
        "records is a dict, not a list"),
    case("a text as requests", edited(lambda editor: editor.edit("The river")), ArgumentError,
        "requests is a str, not a list"),
    case("a number as a text", edited(lambda editor: editor.retract("1")), ArgumentError,
        "edit_ids is a str, not a list of numbers"),
    case("a text among numbers", edited(lambda editor: editor.retract([0, "1"])), ArgumentError,
        "edit_ids holds '1', a str"),
    case("true as a number", edited(lambda editor: editor.retract([True])), ArgumentError,
        "edit_ids holds True, a bool"),
    case("a mapping as settings", on(lambda m, t, hp: RLSEditor(m, t, hp.to_dict())), ArgumentError,
        "hparams is a dict.*from_dict"),
    case("a name as settings", on(lambda m, t, hp: RLSEditor(m, t, "smollm2-135m")), ArgumentError,
        "hparams is a str.*from_hparams"),
    case("layers as a text", settings(layers="12"), HyperParamsError,
        "layers is '12'; allowed: a list of at least one layer number"),
    case("statements as a text", settings(statements="{}:"), HyperParamsError,
        "statements is '{}:'; allowed: a list of texts"),
    case("templates as a text", settings(context_templates="Hello."), HyperParamsError, "context_templates",
        *EDIT, "settings.context_templates=Hello."),
    case("a template with the prompt's place in its middle",
        settings(context_templates=["They say {} often"]), HyperParamsError,
        "allowed: {} at the end of a text, or nowhere", *EDIT,
        "settings.context_templates=['They say {} often']"),
    case("None as a folder", settings(state_dir="None"), HyperParamsError,
        "state_dir is 'None'; allowed: a folder, or null", *EDIT, "state_dir=None"),
    case("an empty name as a folder", settings(state_dir=""), HyperParamsError,
        "state_dir is ''; allowed: a folder, or null"),
    case("no step at all", settings(v_num_grad_steps=1), HyperParamsError,
        "v_num_grad_steps is 1; allowed: 2 or above", *EDIT, "settings.v_num_grad_steps=1"),
    case("nobody's home", lambda folder, tok: read_records("~no-such-user/records.json"), InputError,
        "there is no such home folder. Write the path out", *LOCATE[:3], "~no-such-user/records.json"),
    case("a count of none", lambda folder, tok: read_records("records.jsonl", count=0), HyperParamsError,
        "count is 0; allowed: whole numbers from 1 on", *TUNE, "--count", "0"),
    case("a beginning before the first", lambda folder, tok: read_records("records.jsonl", first=-1),
        HyperParamsError, "first is -1; allowed: whole numbers from 0 on", *COMPARE, "data.first=-1"),
    case("a word for what to do with bad records",
        lambda folder, tok: read_records("records.jsonl", on_bad="ignore"), HyperParamsError,
        "on_bad is 'ignore'; allowed: 'error' or 'skip'", *EDIT, "data.on_bad=ignore"),
    case("half a number of records", lambda folder, tok: read_records("records.jsonl", count=2.5),
        HyperParamsError, "count.*2.5", *EDIT, "data.count=2.5"),
    case("a list as a file", lambda folder, tok: read_records(["records.jsonl"]), ArgumentError,
        "path is a list, not the name|Cannot convert .ListConfig. to string", *EDIT[:2], "data.file=[a,b]"),
    case("half a character", lambda folder, tok: read_records("records.jsonl"), RequestError,
        "field 'target_new': holds half a character", *EDIT, spoil=written("records.jsonl", _HALF)),
    case("no model", on(lambda m, t, hp: RLSEditor(None, t, hp)), LayoutError,
        "NoneType is no model of transformers"),
    case("no tokenizer", on(lambda m, t, hp: RLSEditor(m, None, hp)), ArgumentError,
        "tok is a NoneType, not a tokenizer"),
    case("a number as a state", on(lambda m, t, hp: RLSEditor(m, t, hp, state=5)), ArgumentError,
        "state is a int, not an EditorState"),
    case("bytes as a folder", on(lambda m, t, hp: RLSEditor(m, t, hp, state_dir=b"x")), ArgumentError,
        "state_dir is a bytes"),
    case("a record that is none", on(lambda m, t, hp: edit_quality(m, t, [None])), RequestError,
        "Request 0: is a NoneType, not a mapping"),
    case("no texts", lambda folder, tok: fluency([]), ArgumentError,
        "texts is empty. Give at least one text"),
    case("a number among texts", on(lambda m, t, hp: anchor_pairs(m, t, hp, ["The river", 5])), ArgumentError,
        "An item of prompts is a int"),
    case("a seed beyond all", settings(seed=10**30), HyperParamsError,
        "seed is 10.*; allowed: 0 to 2.63 - 1"),
    case("infinity", settings(lambda_reg=float("inf")), HyperParamsError,
        "lambda_reg is inf; allowed: a finite number"),
    case("batches of none", None, HyperParamsError, "data.batch is 0; allowed: whole numbers from 1 on",
        *EDIT, "data.batch=0"),
    case("batches below none", None, HyperParamsError, "data.batch is -1; allowed: whole numbers from 1 on",
        *COMPARE, "data.batch=-1"),
    case("a word as a batch", None, HyperParamsError,
        "data.batch: Value 'abc'.*could not be converted to Integer", *EDIT, "data.batch=abc"),
    case("no checkpoints", None, HyperParamsError, "eval.every is 0", *COMPARE, "eval.every=0"),
    case("no jobs", None, HyperParamsError, "jobs is 0", *COMPARE, "jobs=0"),
    case("a word for yes or no", None, HyperParamsError, "save: Value 'maybe' is not a valid bool", *EDIT,
        "save=maybe"),
    case("settings that are none", None, HyperParamsError, "settings", *EDIT, "settings=abc"),
    case("an editor that nobody knows", None, HyperParamsError,
        "There is no editor 'AlphaEdt'. Did you mean AlphaEdit", *COMPARE, "alg_name=AlphaEdt"),
    case("settings of nobody", None, HyperParamsError, "There is no editor 'Foo'", *COMPARE,
        "settings.Foo.x=1"),
    case("a number as settings", None, HyperParamsError, "settings.RLSEdit is 5, not settings by name",
        *COMPARE, "settings.RLSEdit=5"),
    case("a file to write into", None, HyperParamsError, "out is records.jsonl, but .* is a file", *EDIT[:3],
        "out=records.jsonl"),
    case("a file as a ledger", None, HyperParamsError, "state_dir is records.jsonl, but .* is a file",
        *EDIT[:3], "out=out", "state_dir=records.jsonl"),
    case("tuning in batches of none", None, HyperParamsError, "--batch is -1", *TUNE, "--batch", "-1"),
    case("tuning in no time", None, HyperParamsError, "--minutes is nan", *TUNE, "--minutes", "nan"),
    case("tuning into a file", None, HyperParamsError, "--out is text.txt, but", *TUNE[:4], "--out",
        "text.txt"),
    case("no noise", None, HyperParamsError, "--samples is 0", *LOCATE, "--samples", "0"),
    case("records that contradict each other", None, RequestError,
        "Request 1: gives .* 'lakes', but record 0 of the same batch 'people'.*on_bad=skip", *EDIT,
        spoil=written("records.jsonl", _CONTRARY)),
    case("two bad records", lambda folder, tok: read_records("records.jsonl"), RequestError,
        r"Request 0, field 'prompt': .*records.jsonl, line 1\) 1 more is wrong: 1. .*on_bad=skip", *EDIT,
        spoil=written("records.jsonl", _BAD)),
]  # fmt: skip
