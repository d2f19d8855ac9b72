"""Files of edit records, as the authors of data sets publish them.

Each record's format is told by its fields (`formats`). EasyEdit's dataset classes give the same records; ours
needs no checkout, keeps the subjects that `ZsreDataset` drops, checks all records before one is used, and
names file, record and field where something is wrong.
"""

import difflib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_rls._base.arguments import at_least
from easyedit_rls._base.files import user_path
from easyedit_rls.data.checks import check_text, text_list
from easyedit_rls.data.formats import FORMATS, format_of
from easyedit_rls.data.raw import RawRecord, raw_records
from easyedit_rls.data.requests import EditRequest, parse_requests
from easyedit_rls.errors import ArgumentError, DataError, HyperParamsError, RequestError, RLSEditWarning

ON_BAD = ("error", "skip")
_CURE = "Mend it, or leave such records out: on_bad=skip."
_SHOWN = 5  # records that a message tells of; it counts the others


@dataclass(frozen=True)
class EditRecord:
    """One edit with everything it is measured on.

    Attributes:
        request: the edit, with its paraphrases and neighbors (CounterFact's figures).
        easyedit: the same in the shape that EasyEdit's evaluation takes: prompt (or messages), subject,
            target_new, and where there are any ground_truth, rephrase_prompt, locality and portability, the
            last two as {name: {"prompt": [...], "ground_truth": [...]}}; and the request's joint.
        generation_prompts: where the model shall go on writing, for fluency and consistency.
        index: number of the file's record that it is from, counted from 0.
        relation: what the record calls the relation that is edited (`relation_id`, of CounterFact and MQuAKE
            Wikidata's number of a property, as in P19); None where it doesn't say.
    """

    request: EditRequest
    easyedit: Mapping[str, Any]
    generation_prompts: tuple[str, ...] = ()
    index: int = 0
    relation: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """A record that is not used.

    Attributes:
        index: its number in the file, counted from 0.
        reason: a sentence, with its line and field where there are any.
    """

    index: int
    reason: str


@dataclass(frozen=True)
class RecordFile:
    """What was read of a file.

    Attributes:
        path: the file.
        records: the edits, in the file's order; a record of MQuAKE gives several.
        n_read: how many of the file's records were looked at.
        left_out: those that hold no edit, and with ``on_bad="skip"`` those that are wrong.
        formats: of the records, by how many have each.
        unknown: fields that their formats don't have.
    """

    path: Path
    records: tuple[EditRecord, ...]
    n_read: int
    left_out: tuple[LeftOut, ...]
    formats: Mapping[str, int]
    unknown: tuple[str, ...]


def read_records(
    path: str | Path,
    first: int = 0,
    count: int | None = None,
    *,
    joint: str | None = None,
    on_bad: str = "error",
) -> list[EditRecord]:
    """The edits of a file; see `read_file`, which tells more. Says what it left out, and which fields it does
    not know, by a warning each.

    Raises:
        DataError, RequestError: see `read_file`.
    """
    found = read_file(path, first, count, joint=joint, on_bad=on_bad)
    if found.left_out:
        warnings.warn(
            f"{path}: left out {listed(found.left_out, found.n_read)}", RLSEditWarning, stacklevel=2
        )
    if found.unknown:
        warnings.warn(f"{path}: {_unknown(found.unknown)}", RLSEditWarning, stacklevel=2)
    return list(found.records)


def read_file(
    path: str | Path,
    first: int = 0,
    count: int | None = None,
    *,
    joint: str | None = None,
    on_bad: str = "error",
) -> RecordFile:
    """Read and check the records of a file.

    Args:
        path: a JSON list; '.jsonl' or '.ndjson', with a record a line; or a '.csv' table. UTF-8, with or
            without a byte-order mark.
        first: how many records to leave out at the beginning.
        count: how many records to take edits from; None takes all.
        joint: what stands between prompt and answer in records that don't say so themselves; None: as their
            texts tell.
        on_bad: 'error' refuses the file if a record is wrong; 'skip' leaves such records out.

    Raises:
        DataError: the file can't be read, or has no edit.
        RequestError: a record is wrong (on_bad="error"): names the file, the first such record (counted from
            the file's beginning) with its field, and how many others there are.
        HyperParamsError: an argument is out of its range.
    """
    if not isinstance(path, (str, Path)):
        raise ArgumentError(f"path is a {type(path).__name__}, not the name of a file.")
    path = user_path(path)
    _check(first, count, on_bad)
    records: list[EditRecord] = []
    left_out: list[LeftOut] = []
    faults: list[RequestError] = []
    formats: dict[str, int] = {}
    unknown: dict[str, None] = {}
    n_read = n_used = 0
    for index, raw in list(enumerate(raw_records(path)))[first:]:
        if n_used == count:
            break
        n_read += 1
        try:
            if _has_no_edit(raw):
                left_out.append(LeftOut(index, "has no new answer"))
                continue
            records += _edits(raw, index, joint)
        except RequestError as exc:
            where = f", {raw.where}" if raw.where else ""
            left_out.append(LeftOut(index, f"{raw.where}: {reason(exc)}" if raw.where else reason(exc)))
            faults.append(RequestError(f"{exc.problem} (in {path}{where})", index=index, field=exc.field))
            continue
        form = format_of(raw.content)
        formats[form.name] = formats.get(form.name, 0) + 1
        unknown |= dict.fromkeys(form.unknown(raw.content))
        n_used += 1
    if faults and on_bad == "error":
        raise refusal(faults)
    if not records:
        what = f"no record that can be used: {listed(left_out, n_read)}" if left_out else "no record."
        raise DataError(
            f"{path} has {what if not first or left_out else f'no record behind number {first}.'}"
        )
    return RecordFile(path, tuple(records), n_read, tuple(left_out), formats, tuple(unknown))


def _check(first: int, count: int | None, on_bad: str) -> None:
    at_least(first, 0, "first")
    if count is not None:
        at_least(count, 1, "count")
    if on_bad not in ON_BAD:
        raise HyperParamsError(f"on_bad is {on_bad!r}; allowed: {' or '.join(map(repr, ON_BAD))}.")


def _has_no_edit(raw: RawRecord) -> bool:
    """Whether it is one of ZsRE's records without a new answer, which EasyEdit leaves out too."""
    return (
        isinstance(raw.content, Mapping)
        and raw.content.get("alt") == ""
        and format_of(raw.content).name == "ZsRE"
    )


def _edits(raw: RawRecord, index: int, joint: str | None) -> list[EditRecord]:
    """A record's edits, checked.

    Raises:
        RequestError: something is wrong with one of them.
    """
    if raw.problem is not None:
        raise RequestError(raw.problem)
    if not isinstance(raw.content, Mapping):
        raise RequestError(f"is a {type(raw.content).__name__}, not a mapping.")
    shared = {} if joint is None else {"joint": joint}
    item = {"case_id": raw.content.get("id", index), **shared, **raw.content}
    prompts = item.get("generation_prompts") or ()
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("is not a list of texts.", field="generation_prompts")
    form = format_of(item)
    try:
        return [_edit(flat, tuple(prompts), index) for flat in form.read(item)]
    except RequestError as exc:
        names = {
            **form.names,
            **({"case_id": "id"} if "case_id" not in raw.content and "id" in raw.content else {}),
        }
        raise RequestError(exc.problem, field=names.get(exc.field, exc.field)) from exc


def _edit(flat: Mapping[str, Any], generation_prompts: tuple[str, ...], index: int) -> EditRecord:
    sections = {
        section: {name: _pair(part, f"{section}.{name}") for name, part in (flat.get(section) or {}).items()}
        for section in ("locality", "portability")
    }
    (request,) = parse_requests([{**flat, **sections}])
    easyedit: dict[str, Any] = {
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": request.target,
        "ground_truth": request.target_true,
        "rephrase_prompt": request.paraphrases[0] if request.paraphrases else None,
        **sections,
    }
    if request.joint is not None:
        easyedit["joint"] = request.joint
    if request.chat is not None:
        turns = [*request.chat, ("user", request.prompt)]
        easyedit["messages"] = [{"role": role, "content": content} for role, content in turns]
        del easyedit["prompt"]
    return EditRecord(request, easyedit, generation_prompts, index, _relation(flat))


def _relation(flat: Mapping[str, Any]) -> str | None:
    """What a record calls its relation, if it says so."""
    relation = flat.get("relation_id")
    if relation is not None and not isinstance(relation, str):
        raise RequestError(
            f"is a {type(relation).__name__}, not text. Give a property of Wikidata, such as P19, or none.",
            field="relation_id",
        )
    return relation or None


def _pair(part: Any, field: str) -> dict[str, list[str]]:
    if not isinstance(part, Mapping):
        raise RequestError("is not a mapping. Give {'prompt': …, 'ground_truth': …}.", field=field)
    pair = {name: text_list(part.get(name), f"{field}.{name}") for name in ("prompt", "ground_truth")}
    for name, values in pair.items():
        for text in values:
            check_text(text, f"{field}.{name}")
    if len(pair["prompt"]) != len(pair["ground_truth"]):
        raise RequestError(
            f"has {len(pair['ground_truth'])} answers for {len(pair['prompt'])} prompts.", field=field
        )
    return pair


def refusal(faults: Sequence[RequestError]) -> RequestError:
    """One error for all records that are wrong: the first one's, and the numbers of the others."""
    first, *others = faults
    if not others:
        return RequestError(f"{first.problem} {_CURE}", index=first.index, field=first.field)
    numbers = ", ".join(str(fault.index) for fault in others[:_SHOWN]) + (
        ", …" if len(others) > _SHOWN else ""
    )
    more = f"{len(others)} more {'is' if len(others) == 1 else 'are'} wrong: {numbers}."
    return RequestError(f"{first.problem} {more} {_CURE}", index=first.index, field=first.field)


def reason(fault: RequestError) -> str:
    """What is wrong with a record that is left out, without its number."""
    return f"field '{fault.field}' {fault.problem}" if fault.field else fault.problem


def listed(left_out: Sequence[LeftOut], n_read: int) -> str:
    """What was left out and why, records of one reason together."""
    shown = [f"{one.index} ({one.reason})" for one in left_out[:_SHOWN]]
    more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    return f"{len(left_out)} of {n_read} records: {', '.join(shown)}{more}."


def _unknown(names: Sequence[str]) -> str:
    """What is not read, and what may be meant."""
    known = sorted({name for one in FORMATS for name in one.fields})
    close = {name: difflib.get_close_matches(name, known, n=1, cutoff=0.75) for name in names}
    shown = (
        f"{name or repr(name)} (did you mean {close[name][0]}?)" if close[name] else name or repr(name)
        for name in names
    )
    return f"fields that are not read: {', '.join(shown)}."
