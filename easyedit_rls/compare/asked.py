"""Records as an editor lets them be asked: what it puts in front of prompts stands in front of each."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from easyedit_rls.data.records import EditRecord
from easyedit_rls.data.requests import EditRequest, Probe

InFront = Callable[[str], str]


def asked(record: EditRecord, in_front: InFront) -> EditRecord:
    """The record with all its prompts behind the texts that belong in front of them.

    Args:
        record: as it was read.
        in_front: gives a prompt's text; of a chat, it gets the user's turn. See `Editor.in_front`.
    """
    return replace(
        record,
        request=_request(record.request, in_front),
        easyedit=_easyedit(record.easyedit, in_front),
        generation_prompts=tuple(in_front(prompt) + prompt for prompt in record.generation_prompts),
    )


def asked_probe(probe: Probe, in_front: InFront) -> Probe:
    """The same of one prompt."""
    return replace(probe, prompt=in_front(probe.prompt) + probe.prompt)


def _request(request: EditRequest, in_front: InFront) -> EditRequest:
    return replace(
        request,
        before=in_front(request.prompt) + request.before,
        paraphrases=tuple(in_front(prompt) + prompt for prompt in request.paraphrases),
        neighbors=tuple(asked_probe(neighbor, in_front) for neighbor in request.neighbors),
    )


def _easyedit(raw: Mapping[str, Any], in_front: InFront) -> dict[str, Any]:
    """`EditRecord.easyedit`; see there what it holds."""
    changed = {
        name: in_front(raw[name]) + raw[name]
        for name in ("prompt", "rephrase_prompt")
        if raw.get(name) is not None
    }
    if "messages" in raw:
        *turns, last = raw["messages"]
        changed["messages"] = [*turns, {**last, "content": in_front(last["content"]) + last["content"]}]
    for section in ("locality", "portability"):
        changed[section] = {
            name: {**part, "prompt": [in_front(prompt) + prompt for prompt in part["prompt"]]}
            for name, part in raw[section].items()
        }
    return {**raw, **changed}
