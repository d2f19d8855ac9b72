"""Arguments that could be taken for something else: one text for its letters, a word for a name, a number for none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from easyedit_rls import RLSEditHyperParams, RLSEditor, evaluate, perplexity
from easyedit_rls.anchors.pairs import anchor_pairs
from easyedit_rls.data.records import read_records
from easyedit_rls.errors import ArgumentError, HyperParamsError, InputError, RequestError
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
_BAD = '{"prompt": "The river Oder", "subject": "Elbe", "target_new": "people"}\n{"prompt": 3}\n'

ARGUMENTS = [
    case("one text as anchors", on(lambda m, t, hp: RLSEditor(m, t, hp, anchors="The river")), ArgumentError, f"anchors {_ONE_TEXT}"),
    case("one text as anchor pairs", on(lambda m, t, hp: anchor_pairs(m, t, hp, "The river")), ArgumentError, f"prompts {_ONE_TEXT}"),
    case(
        "one text to go on from",
        on(lambda m, t, hp: generate(m, t, "The river", max_new_tokens=2)),
        ArgumentError,
        f"prompts {_ONE_TEXT}",
    ),
    case("one text as answers", on(lambda m, t, hp: answers(m, t, ["The river"], "people")), ArgumentError, f"wanted {_ONE_TEXT}"),
    case("one text's fluency", lambda folder, tok: fluency("The river flows."), ArgumentError, f"texts {_ONE_TEXT}"),
    case("one reference", lambda folder, tok: consistency(["The river."], "The lake."), ArgumentError, f"references {_ONE_TEXT}"),
    case("a list of texts for one", on(lambda m, t, hp: perplexity(m, t, ["The river"])), ArgumentError, "text is a list, not a text"),
    case("a text as records", on(lambda m, t, hp: evaluate(m, t, "The river")), ArgumentError, "requests is a str, not a list"),
    case("one record for a list", on(lambda m, t, hp: edit_quality(m, t, FACT)), ArgumentError, "records is a dict, not a list"),
    case("a text as requests", edited(lambda editor: editor.edit("The river")), ArgumentError, "requests is a str, not a list"),
    case("a number as a text", edited(lambda editor: editor.retract("1")), ArgumentError, "edit_ids is a str, not a list of numbers"),
    case("a text among numbers", edited(lambda editor: editor.retract([0, "1"])), ArgumentError, "edit_ids holds '1', a str"),
    case("true as a number", edited(lambda editor: editor.retract([True])), ArgumentError, "edit_ids holds True, a bool"),
    case("a mapping as settings", on(lambda m, t, hp: RLSEditor(m, t, hp.to_dict())), ArgumentError, "hparams is a dict.*from_dict"),
    case("a name as settings", on(lambda m, t, hp: RLSEditor(m, t, "smollm2-135m")), ArgumentError, "hparams is a str.*from_hparams"),
    case("layers as a text", settings(layers="12"), HyperParamsError, "layers is '12'; allowed: a list of at least one layer number"),
    case("statements as a text", settings(statements="{}:"), HyperParamsError, "statements is '{}:'; allowed: a list of texts"),
    case(
        "templates as a text",
        settings(context_templates="Hello."),
        HyperParamsError,
        "context_templates",
        *EDIT,
        "settings.context_templates=Hello.",
    ),
    case(
        "a template with the prompt's place in its middle",
        settings(context_templates=["They say {} often"]),
        HyperParamsError,
        "allowed: {} at the end of a text, or nowhere",
        *EDIT,
        "settings.context_templates=['They say {} often']",
    ),
    case(
        "None as a folder",
        settings(state_dir="None"),
        HyperParamsError,
        "state_dir is 'None'; allowed: a folder, or null",
        *EDIT,
        "state_dir=None",
    ),
    case("an empty name as a folder", settings(state_dir=""), HyperParamsError, "state_dir is ''; allowed: a folder, or null"),
    case(
        "no step at all",
        settings(v_num_grad_steps=1),
        HyperParamsError,
        "v_num_grad_steps is 1; allowed: 2 or above",
        *EDIT,
        "settings.v_num_grad_steps=1",
    ),
    case(
        "nobody's home",
        lambda folder, tok: read_records("~no-such-user/records.json"),
        InputError,
        "there is no such home folder. Write the path out",
        *LOCATE[:3],
        "~no-such-user/records.json",
    ),
    case(
        "a count of none",
        lambda folder, tok: read_records("records.jsonl", count=0),
        HyperParamsError,
        "count is 0; allowed: 1 or above",
        *TUNE,
        "--count",
        "0",
    ),
    case(
        "a beginning before the first",
        lambda folder, tok: read_records("records.jsonl", first=-1),
        HyperParamsError,
        "first is -1; allowed: 0 or above",
        *COMPARE,
        "data.first=-1",
    ),
    case(
        "a word for what to do with bad records",
        lambda folder, tok: read_records("records.jsonl", on_bad="ignore"),
        HyperParamsError,
        "on_bad is 'ignore'; allowed: 'error' or 'skip'",
        *EDIT,
        "data.on_bad=ignore",
    ),
    case(
        "two bad records",
        lambda folder, tok: read_records("records.jsonl"),
        RequestError,
        r"Request 0, field 'prompt': .*records.jsonl, line 1\) 1 more is wrong: 1. .*on_bad=skip",
        *EDIT,
        spoil=written("records.jsonl", _BAD),
    ),
]
