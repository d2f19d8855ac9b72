"""Readers of records, one a published format: a record to flat mappings, one an edit.

The mappings have the names that `parse_requests` knows, with ``locality`` and ``portability`` as {name:
{"prompt": [...], "ground_truth": [...]}}. What can't be read is left for the checks behind to name.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from easyedit_rls.errors import RequestError

Flat = dict[str, Any]

SHARED = ("case_id", "joint", "messages", "importance")  # a record of any format may say these
FLAT = (
    "prompt subject target_new target_true ground_truth "
    "rephrase_prompt paraphrase_prompts neighborhood_prompts generation_prompts cond"
)
OTHER_NAMES = {"prompt": "text", "target_new": "labels", "subject": "concept", "rephrase_prompt": "rephrase"}
_NOBODY_KNOWS = "<|endoftext|>"  # what stands for the true answer in MEMIT's ZsRE
_HOPS = range(2, 7)  # HalluEditBench asks with two to six hops


def counterfact(raw: Mapping[str, Any]) -> list[Flat]:
    """CounterFact (Meng et al. 2022), and what MEMIT's and AlphaEdit's code makes of ZsRE, with an answer for
    each neighbor.

    AKEW's records (Wu et al. 2024) hold, besides, a text that tells the same fact, ``fact_new_uns``: what
    they are made to edit in. It is the target then, behind their question, and the facts taken from it are
    portability.
    """
    fact = raw["requested_rewrite"]
    if not isinstance(fact, Mapping):
        raise RequestError("is not a mapping.", field="requested_rewrite")
    flat = {**_kept(raw, *SHARED, "paraphrase_prompts", "generation_prompts"), **fact}
    true = _said(_first(_text_of(fact.get("target_true"))))
    if true == _NOBODY_KNOWS:
        flat["target_true"] = true = None
    near = [_near(item, true) for item in _list(raw.get("neighborhood_prompts"))]
    if answered := [pair for pair in near if pair[1] is not None]:
        flat["locality"] = {"neighborhood": _pairs(answered)}
    return [_unstructured(flat, fact)]


def _near(item: Any, true: Any) -> tuple[Any, Any]:
    """A neighbor's prompt and answer: those of {prompt, target}, or a text, whose answer is the record's true
    one.
    """
    return (item.get("prompt"), item.get("target")) if isinstance(item, Mapping) else (item, true)


def _unstructured(flat: Flat, fact: Mapping[str, Any]) -> Flat:
    """AKEW's long answer instead of the short one, where there is one."""
    if "fact_new_uns" not in fact:
        return flat
    prompt = next((fact[name] for name in ("question", "prompt_full") if fact.get(name)), fact.get("prompt"))
    told = [part for part in _list(fact.get("unsfact_triplets_GPT")) if isinstance(part, Mapping)]
    asked = _pairs(
        (str(part.get("prompt", "")).replace("{}", str(part.get("subject", ""))), part.get("target"))
        for part in told
    )
    return flat | {
        "prompt": prompt,
        "target_new": fact["fact_new_uns"],
        "portability": {**flat.get("portability", {}), **({"sub_question": asked} if told else {})},
    }


def mquake(raw: Mapping[str, Any]) -> list[Flat]:
    """MQuAKE (Zhong et al. 2023): a chain of edits, a question about each, and questions that need all of
    them.

    The latter are asked of the record's last edit, once, since they can't be answered before all are made.
    """
    edits = []
    case = raw.get("case_id")
    for number, fact in enumerate(raw["requested_rewrite"]):
        if not isinstance(fact, Mapping):
            raise RequestError(
                f"holds a {type(fact).__name__} as edit {number}, not a mapping.", field="requested_rewrite"
            )
        flat = {**_kept(raw, *SHARED), **fact, "case_id": case if case is None else f"{case}.{number}"}
        if fact.get("question"):
            flat["portability"] = {
                "single_hop": _pairs([(fact["question"], _text_of(fact.get("target_new")))])
            }
        edits.append(_unstructured(flat, fact))
    if not edits:
        raise RequestError("is empty.", field="requested_rewrite")
    questions = _list(raw.get("questions"))
    if questions and raw.get("new_answer"):
        hops = {"multi_hop": _pairs((question, raw["new_answer"]) for question in questions)}
        edits[-1]["portability"] = {**edits[-1].get("portability", {}), **hops}
    return edits


def zsre(raw: Mapping[str, Any]) -> list[Flat]:
    """ZsRE as MEND has it (Levy et al. 2017; Mitchell et al. 2022), with the question about a consequence
    that EasyEdit adds.
    """
    flat = _kept(raw, *SHARED, "subject")
    flat |= {
        "prompt": raw["src"],
        "target_new": raw["alt"],
        "rephrase_prompt": raw.get("rephrase"),
        "ground_truth": raw.get("answers"),
    }
    if raw.get("loc") is not None:
        flat["locality"] = {"neighborhood": _pairs([(raw["loc"], raw.get("loc_ans"))])}
    hop = raw.get("portability") or {}
    if not isinstance(hop, Mapping):
        raise RequestError(f"is a {type(hop).__name__}, not a mapping.", field="portability")
    if "New Question" in hop:
        flat["portability"] = {"one_hop": _pairs([(hop["New Question"], hop.get("New Answer"))])}
    return [flat]


def wikibigedit(raw: Mapping[str, Any]) -> list[Flat]:
    """WikiBigEdit as published (Thede et al. 2025): facts that changed in Wikidata, asked in other words, by
    personas and by two hops.
    """
    flat = _kept(raw, *SHARED, "subject", "ground_truth")
    flat |= {"prompt": raw["update"], "target_new": raw["ans"], "rephrase_prompt": _said(raw.get("rephrase"))}
    if _said(raw.get("loc")):
        flat["locality"] = {"neighborhood": _pairs([(raw["loc"], raw.get("loc_ans"))])}
    asked = {
        name: (raw.get(name), raw["ans"]) for name in raw if name.startswith("personas") and _said(raw["ans"])
    } | {"mhop": (raw.get("mhop"), raw.get("mhop_ans"))}
    flat["portability"] = {name: _pairs([pair]) for name, pair in asked.items() if _said(pair[0])}
    return [flat]


def halluedit(raw: Mapping[str, Any]) -> list[Flat]:
    """HalluEditBench (Huang et al. 2025): facts that a model got wrong; a row of its CSV files.

    Its questions about the subject's other facts come without answers, so there is nothing to hold the edited
    model's to: they are left out.
    """
    flat = _kept(raw, *SHARED, "subject")
    flat |= {
        "prompt": raw["question"],
        "target_new": raw["object"],
        "rephrase_prompt": raw.get("paraphrased_question"),
    }
    choices = (
        f"{raw['question']} {raw['multiple_choice_with_letters']}"
        if raw.get("multiple_choice_with_letters")
        else None
    )
    asked = {
        "multiple_choice": (choices, raw.get("multiple_choice_labels")),
        "yes": (raw.get("yes_question"), "Yes"),
        "no": (raw.get("no_question"), "No"),
        "reversed_relation": (raw.get("reversed_relation_question"), raw["subject"]),
        **{f"{n}hop": (raw.get(f"question_{n}hop"), raw.get(f"answer_{n}hop")) for n in _HOPS},
    }
    flat["portability"] = {
        name: _pairs([pair]) for name, pair in asked.items() if _said(pair[0]) and _said(pair[1])
    }
    return [flat]


def unke(raw: Mapping[str, Any]) -> list[Flat]:
    """UnKE (Deng et al. 2024): a question and a long answer, with no subject.

    The whole question is the subject then, so that the value sits at the question's last token, where UnKE
    edits.
    """
    flat = _kept(raw, *SHARED) | {"prompt": "{}", "subject": raw["question"], "target_new": raw["answer"]}
    flat["rephrase_prompt"] = _said(raw.get("para_question"))
    asked, answers = _list(raw.get("sub_question")), _list(raw.get("sub_answer"))
    if asked:
        flat["portability"] = {"sub_question": {"prompt": asked, "ground_truth": answers}}
    return [flat]


def qaedit(raw: Mapping[str, Any]) -> list[Flat]:
    """QAEdit (Yang et al. 2025): questions of NQ, TriviaQA and SimpleQA."""
    flat = _kept(raw, *SHARED, "prompt", "subject", "ground_truth") | {
        "target_new": raw["target"],
        "rephrase_prompt": raw.get("rephrase"),
    }
    return [flat | {section: dict(_parts(raw, section)) for section in ("locality", "portability")}]


def easyedit(raw: Mapping[str, Any]) -> list[Flat]:
    """EasyEdit's own flat names, what its data set classes give, and KnowEdit (Zhang et al. 2024), which has
    other names for some.
    """
    flat = _kept(raw, *SHARED, *FLAT.split())
    for name, other in OTHER_NAMES.items():
        if raw.get(name) is None and raw.get(other) is not None:
            flat[name] = raw[other]
    return [flat | {section: dict(_parts(raw, section)) for section in ("locality", "portability")}]


def _parts(raw: Mapping[str, Any], section: str) -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """A section's parts, however they are written.

    KnowEdit: {name: [{"prompt", "ground_truth"}, ...]}. EasyEdit: {name: {"prompt", "ground_truth"}}. QAEdit:
        [{"loc", "loc_ans"}, ...].
    EasyEdit's data set classes: texts, with their answers in `locality_ans`. One flat pair:
    `locality_prompt`, `locality_ground_truth`.
    """
    parts, only = raw.get(section) or {}, "neighborhood" if section == "locality" else "one_hop"
    is_texts = isinstance(parts, str) or (
        isinstance(parts, list) and all(isinstance(part, str) for part in parts)
    )
    if is_texts and f"{section}_ans" in raw:
        parts = {only: {"prompt": parts, "ground_truth": raw[f"{section}_ans"]}}
    elif isinstance(parts, list) and all(isinstance(part, Mapping) and "loc" in part for part in parts):
        parts = {only: _pairs((part["loc"], part.get("loc_ans")) for part in parts)}
    if not isinstance(parts, Mapping):
        raise RequestError(f"is a {type(parts).__name__}, not a mapping.", field=section)
    for name, part in parts.items():
        if isinstance(part, list):
            whole = [
                item
                for item in part
                if isinstance(item, Mapping) and {"prompt", "ground_truth"} <= item.keys()
            ]
            if len(whole) != len(part):
                raise RequestError(
                    "is not a list of {'prompt': …, 'ground_truth': …}.", field=f"{section}.{name}"
                )
            answered = [(item["prompt"], _first(item["ground_truth"])) for item in whole]
            kept = [
                (prompt, answer) for prompt, answer in answered if str(answer or "").strip()
            ]  # EasyEdit leaves empty answers out
            if kept:
                yield name, _pairs(kept)
        elif part:
            yield name, part
    if _said(raw.get(f"{section}_prompt")):
        prompt, answer = raw[f"{section}_prompt"], raw.get(f"{section}_ground_truth")
        answers = answer if isinstance(prompt, list) else [answer]
        yield only, {"prompt": _list(prompt), "ground_truth": _list(answers)}
    for name, answer in (("personas", raw.get("target_new")), ("hop", raw.get("portability_hop_ans"))):
        if section == "portability" and _said(raw.get(f"portability_{name}")):
            yield name, _pairs([(raw[f"portability_{name}"], answer)])


def _kept(raw: Mapping[str, Any], *names: str) -> Flat:
    return {name: raw[name] for name in names if name in raw}


def _pairs(pairs: Iterable[tuple[Any, Any]]) -> dict[str, list[Any]]:
    listed = list(pairs)
    return {
        "prompt": [prompt for prompt, _ in listed],
        "ground_truth": [_first(answer) for _, answer in listed],
    }


def _list(value: Any) -> list[Any]:
    """Nothing as no items, one text as one."""
    return value if isinstance(value, list) else [value] if value else []


def _said(value: Any) -> Any:
    """None for what stands for nothing: an empty text, or the NaN that tables have in empty cells."""
    is_empty = (
        value is None
        or (isinstance(value, str) and not value.strip())
        or (isinstance(value, float) and value != value)
    )
    return None if is_empty else value


def _text_of(value: Any) -> Any:
    return value.get("str") if isinstance(value, Mapping) else value


def _first(answer: Any) -> Any:
    """The first answer of nested lists of right ones."""
    while isinstance(answer, list):
        answer = answer[0] if answer else None
    return answer
