"""Files of edit records, as the authors of data sets publish them: CounterFact, ZsRE, KnowEdit, EasyEdit's flat dicts, JSON lines.

A file's format is read off each record's fields. EasyEdit's dataset classes give the same records; ours needs no checkout, keeps the
subjects that `ZsreDataset` drops, and names the record and the field where something is wrong.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyedit_rls.errors import RequestError
from easyedit_rls.requests import EditRequest, parse_requests


@dataclass(frozen=True)
class EditRecord:
    """One edit with everything it is measured on.

    Attributes:
        request: the edit, with its paraphrases and neighbours (CounterFact's figures).
        easyedit: the same in the shape that EasyEdit's evaluation takes: prompt (or messages), subject, target_new, and where there are any
            ground_truth, rephrase_prompt, locality and portability, the last two as {name: {"prompt": [...], "ground_truth": [...]}};
            and the request's joint.
        generation_prompts: where the model shall go on writing, for fluency and consistency.
    """

    request: EditRequest
    easyedit: Mapping[str, Any]
    generation_prompts: tuple[str, ...] = ()


def read_records(path: str | Path, first: int = 0, count: int | None = None, *, joint: str | None = None) -> list[EditRecord]:
    """Read edit records from a file.

    Args:
        path: a JSON list, or a file whose name ends in '.jsonl' with one record a line.
        first: how many records to leave out at the beginning.
        count: how many to read; None reads all.
        joint: what stands between prompt and answer in records that don't say so themselves; None: as their texts tell.

    Raises:
        RequestError: the file can't be read, or a record is wrong; names file, record (counted from the file's beginning) and field.
    """
    path = Path(path)
    raw = list(enumerate(_raw(path)))[first:]
    records: list[EditRecord] = []
    for index, item in raw:
        if count is not None and len(records) == count:
            break
        try:
            if not isinstance(item, Mapping):
                raise RequestError(f"is a {type(item).__name__}, not a mapping.")
            if item.get("alt") == "":  # ZsRE's records without a new answer; EasyEdit leaves them out too
                continue
            shared = {} if joint is None else {"joint": joint}
            records.append(_record({"case_id": index, **shared, **item}))
        except RequestError as exc:
            raise RequestError(f"{exc.problem} (in {path})", index=index, field=exc.field) from None
    if not records:
        raise RequestError(f"{path} has no record behind number {first}." if first else f"{path} has no record.")
    return records


def _raw(path: Path) -> Sequence[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise RequestError(f"{path.absolute()} can't be read: {exc.strerror}. Check the path.") from exc
    except UnicodeDecodeError as exc:
        raise RequestError(f"{path} is not UTF-8 text: {exc}.") from exc
    if path.suffix == ".jsonl":
        return [_json(line, f"{path}, line {n}") for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    found = _json(text, str(path))
    if not isinstance(found, list):
        raise RequestError(f"{path} holds a {type(found).__name__}, not a list of records. (Files with a record a line end in '.jsonl'.)")
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:  # a number of thousands of digits is the former, nesting without end the latter
        raise RequestError(f"{where} is no JSON: {exc}.") from exc


def _record(raw: Mapping[str, Any]) -> EditRecord:
    flat = _flat(raw)
    sections = {
        section: {name: _pair(part, f"{section}.{name}") for name, part in (flat.get(section) or {}).items()}
        for section in ("locality", "portability")
    }
    (request,) = parse_requests([{**flat, **sections, **_paraphrased(raw)}])
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
    prompts = raw.get("generation_prompts") or ()
    if not isinstance(prompts, (list, tuple)) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RequestError("is not a list of texts.", field="generation_prompts")
    return EditRecord(request=request, easyedit=easyedit, generation_prompts=tuple(prompts))


def _paraphrased(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {"paraphrase_prompts": raw["paraphrase_prompts"]} if raw.get("paraphrase_prompts") else {}


def _flat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Any format as EasyEdit's flat dict, with locality and portability by name."""
    if "requested_rewrite" in raw:
        return _counterfact(raw)
    if "src" in raw and "alt" in raw:
        return _zsre(raw)
    flat = dict(raw)
    if "text" in raw and "prompt" not in raw and "messages" not in raw:  # KnowEdit's other names
        flat |= {"prompt": raw["text"], "target_new": raw.get("labels"), "subject": raw.get("concept", raw.get("subject"))}
    flat |= {section: dict(_parts(raw, section)) for section in ("locality", "portability")}
    for name in ("locality_prompt", "locality_ground_truth", "portability_prompt", "portability_ground_truth"):
        flat.pop(name, None)
    return flat


def _counterfact(raw: Mapping[str, Any]) -> dict[str, Any]:
    fact = raw["requested_rewrite"]
    if not isinstance(fact, Mapping):
        raise RequestError("is not a mapping.", field="requested_rewrite")
    flat = {**{key: raw[key] for key in ("case_id", "joint", "messages") if key in raw}, **fact}
    near = raw.get("neighborhood_prompts") or []
    true = fact.get("target_true")
    answer = true.get("str") if isinstance(true, Mapping) else true
    return flat | {"locality": {"neighborhood": {"prompt": near, "ground_truth": [answer] * len(near)}} if near else {}}


def _zsre(raw: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: raw[key] for key in ("case_id", "subject", "joint") if key in raw}
    flat |= {"prompt": raw["src"], "target_new": raw["alt"], "rephrase_prompt": raw.get("rephrase"), "ground_truth": raw.get("answers")}
    if raw.get("loc") is not None:
        flat["locality"] = {"neighborhood": {"prompt": [raw["loc"]], "ground_truth": [raw.get("loc_ans")]}}
    hop = raw.get("portability") or {}
    if "New Question" in hop:
        flat["portability"] = {"one_hop": {"prompt": [hop["New Question"]], "ground_truth": [hop.get("New Answer")]}}
    return flat


def _parts(raw: Mapping[str, Any], section: str) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """A section's parts: KnowEdit's lists of items, EasyEdit's {"prompt", "ground_truth"}, or one flat pair of fields."""
    parts = raw.get(section) or {}
    if not isinstance(parts, Mapping):
        raise RequestError(f"is a {type(parts).__name__}, not a mapping.", field=section)
    for name, part in parts.items():
        if isinstance(part, list):
            pairs = [
                (item["prompt"], _first(item["ground_truth"])) for item in part if isinstance(item, Mapping) and "ground_truth" in item
            ]
            if len(pairs) != len(part):
                raise RequestError("is not a list of {'prompt': …, 'ground_truth': …}.", field=f"{section}.{name}")
            kept = [(prompt, answer) for prompt, answer in pairs if str(answer or "").strip()]  # EasyEdit leaves empty answers out
            if kept:
                yield name, {"prompt": [prompt for prompt, _ in kept], "ground_truth": [answer for _, answer in kept]}
        elif part:
            yield name, part
    if raw.get(f"{section}_prompt") is not None:
        name = "neighborhood" if section == "locality" else "one_hop"
        yield name, {"prompt": [raw[f"{section}_prompt"]], "ground_truth": [raw.get(f"{section}_ground_truth")]}


def _first(answer: Any) -> Any:
    """The first answer of nested lists of right ones."""
    while isinstance(answer, list):
        answer = answer[0] if answer else None
    return answer


def _pair(part: Any, field: str) -> dict[str, list[str]]:
    if not isinstance(part, Mapping):
        raise RequestError("is not a mapping. Give {'prompt': …, 'ground_truth': …}.", field=field)
    pair = {}
    for name in ("prompt", "ground_truth"):
        value = part.get(name)
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) and text.strip() for text in values):
            raise RequestError("is neither a text nor a list of texts.", field=f"{field}.{name}")
        pair[name] = list(values)
    if len(pair["prompt"]) != len(pair["ground_truth"]):
        raise RequestError(f"has {len(pair['ground_truth'])} answers for {len(pair['prompt'])} prompts.", field=field)
    return pair
