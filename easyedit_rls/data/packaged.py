"""Texts and facts that come with the package, written for it."""

import importlib.resources
import json

from easyedit_rls.data.requests import EditRequest, parse_requests


def packaged_text(name: str) -> str:
    """What a file of this folder says, e.g. demo_text.txt."""
    return importlib.resources.files("easyedit_rls.data").joinpath(name).read_text(encoding="utf-8")


def demo_facts() -> list[EditRequest]:
    """The demo's facts; those of one relation stand together."""
    return parse_requests(json.loads(packaged_text("demo_facts.json")))
