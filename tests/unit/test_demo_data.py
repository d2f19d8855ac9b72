"""The facts that come with the package are what the README says they are."""

import json

from easyedit_rls.data.packaged import packaged_text
from easyedit_rls.data.requests import parse_requests


def test_demo_facts():
    raw = json.loads(packaged_text("demo_facts.json"))
    assert len(raw) >= 60
    assert len({record["requested_rewrite"]["relation_id"] for record in raw}) >= 10
    assert {record["kind"] for record in raw} == {"update", "counterfactual"}
    requests = parse_requests(raw)
    assert len({request.subject for request in requests}) == len(requests)
    for request in requests:
        assert len(request.paraphrases) >= 2
        assert len(request.neighbors) >= 3
        assert request.target != request.target_true
        assert all(request.subject in prompt for prompt in request.paraphrases)
        assert not any(request.subject in neighbor.prompt for neighbor in request.neighbors)
