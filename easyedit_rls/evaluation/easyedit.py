"""EasyEdit's own figures, batched: `rewrite_acc`, `rephrase_acc`, locality and portability.

The same numbers as `compute_edit_quality` gives for its default, teacher forcing by tokens
(`eval_metric="token_em"`), which runs one prompt at a time through the whole model; here all prompts of all
records share passes. What is measured is EasyEdit's choice: a prompt's tokens are counted without the answer,
and where several prompts of one record run together there, left-padded, models with absolute positions
(GPT-2) see them shifted; here they don't.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.arguments import listed
from easyedit_rls.data.checks import Chat, parse_joint, parse_messages, text_list, told_of
from easyedit_rls.data.requests import Probe
from easyedit_rls.errors import RequestError
from easyedit_rls.evaluation.scores import accuracy, predict_rows
from easyedit_rls.model.limits import refuse_unfit
from easyedit_rls.model.subject import Row, answer_rows

_ANSWERED = {"rewrite_acc": ("prompt", "target_new"), "rephrase_acc": ("rephrase_prompt", "target_new")}


def edit_quality(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    chat_template: bool = False,
    batch_tokens: int = 2048,
    show_progress: bool | None = None,
) -> list[dict[str, Any]]:
    """Figures of each record, in the shape in which EasyEdit gives them.

    Args:
        model: edited or not.
        tok: its tokenizer.
        records: EasyEdit's dicts: prompt and target_new, and where there are any rephrase_prompt, locality
            and portability, the last two as {name: {"prompt": …, "ground_truth": …}}. A prompt may be a list,
            with as many answers. `messages` and `joint` are as in a request (`requests`).
        chat_template: make every prompt a user's turn in the tokenizer's chat template.
        batch_tokens: tokens in one pass, at most.
        show_progress: None shows a bar on a terminal only.

    Returns:
        For each record ``{"rewrite_acc": [share of answer tokens that are the argmax], "rephrase_acc": [...],
        "locality": {"<name>_output": [[argmax tokens]]}, "portability": {"<name>_acc": [...]}}``; of what a
        record lacks there is nothing.

    Raises:
        ArgumentError: one record was given instead of a list.
        RequestError: names the record, the field and the cure.
        ModelError: a token is none of the model's.
    """
    asked, rows = _tokenized(model, tok, listed(records, "records", "records"), chat_template)
    predicted = predict_rows(
        model, rows, batch_tokens=batch_tokens, desc="evaluating", show_progress=show_progress
    )
    answers = iter(zip(rows, predicted))
    return [_quality(parts, answers) for parts in asked]


def refuse_unfit_quality(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    *,
    chat_template: bool = False,
) -> None:
    """See that `edit_quality` can measure records, without running the model; raises what it would."""
    _tokenized(model, tok, records, chat_template)


def _tokenized(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    records: Sequence[Mapping[str, Any]],
    chat_template: bool,
) -> tuple[list[list[tuple[str, str, list[Probe]]]], list[Row]]:
    """What each record asks, see `_asked`, and the rows of all of it."""
    asked = []
    for index, record in enumerate(records):
        with told_of(index):
            asked.append(list(_asked(record, () if chat_template else None)))
    numbered = [(i, probe) for i, parts in enumerate(asked) for _, _, probes in parts for probe in probes]
    numbers = [i for i, _ in numbered]
    rows = answer_rows(tok, [probe for _, probe in numbered], numbers)
    refuse_unfit(model, tok, [row.ids for row in rows], numbers)
    return asked, rows


def add_locality(before: Sequence[Mapping[str, Any]], after: Sequence[dict[str, Any]]) -> None:
    """Write `<name>_acc` into `after`: how many of the answers' tokens are as before the edit (EasyEdit's
    `finalize_locality_metrics`).

    Args:
        before: `edit_quality` of the unedited model.
        after: of the edited one, on the same records.
    """
    for old, new in zip(before, after, strict=True):
        for name in list(new["locality"]):
            pairs = zip(old["locality"][name], new["locality"][name], strict=True)
            new["locality"][name.removesuffix("_output") + "_acc"] = [
                sum(a == b for a, b in zip(x, y)) / len(y) for x, y in pairs
            ]


def _asked(record: Mapping[str, Any], chat: Chat | None) -> Iterator[tuple[str, str, list[Probe]]]:
    """(section, name, prompts with answers) of everything a record asks; the section of the first two is
    empty.
    """
    if not isinstance(record, Mapping):
        raise RequestError(f"is a {type(record).__name__}, not a mapping.")
    if record.get("messages") is not None:
        chat, turn = parse_messages(record)
        record = {**record, "prompt": turn}
    joint = parse_joint(record)
    for name, (prompt, answer) in _ANSWERED.items():
        if name == "rewrite_acc" or record.get(prompt):
            yield "", name, _probes(record, (prompt, answer), "", joint, chat)
    for section, ending in (("locality", "output"), ("portability", "acc")):
        for name, part in (record.get(section) or {}).items():
            if not isinstance(part, Mapping):
                raise RequestError(
                    "is not a mapping. Give {'prompt': …, 'ground_truth': …}.", field=f"{section}.{name}"
                )
            probes = _probes(part, ("prompt", "ground_truth"), f"{section}.{name}.", joint, chat)
            yield section, f"{name}_{ending}", probes


def _probes(
    part: Mapping[str, Any], names: tuple[str, str], place: str, joint: str | None, chat: Chat | None
) -> list[Probe]:
    """Prompts with their answers, of a mapping's fields of these names; none may be empty."""
    prompts, answers = (text_list(part.get(name), place + name, least=1) for name in names)
    if len(prompts) != len(answers):
        raise RequestError(
            f"has {len(answers)} texts for {len(prompts)} prompts. Give one for each.", field=place + names[1]
        )
    return [Probe(prompt, answer, joint, chat) for prompt, answer in zip(prompts, answers)]


def _quality(
    parts: Sequence[tuple[str, str, list[Probe]]], answers: Iterator[tuple[Row, tuple[int, ...]]]
) -> dict[str, Any]:
    """One record's figures, from as many rows, with the tokens predicted for their targets, as it has
    prompts.
    """
    result: dict[str, Any] = {"locality": {}, "portability": {}}
    for section, name, texts in parts:
        found = list(islice(answers, len(texts)))
        place = result[section] if section else result
        place[name] = [
            list(top) if name.endswith("_output") else accuracy(top, row.target) for row, top in found
        ]
    return result
