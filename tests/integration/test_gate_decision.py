"""A gated memory: who sees the edits, and what the gate goes by."""

import pytest
import torch

from easyedit_rls import GateError, RLSEditHyperParams, RLSEditor, UnsaidWarning
from easyedit_rls.anchors.ordinary import ordinary_keys
from easyedit_rls.anchors.text import token_blocks
from easyedit_rls.errors import HyperParamsError
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_history
from easyedit_rls.model.gated_weight import find_decision
from easyedit_rls.model.hooks import tap
from easyedit_rls.model.layout import find_layout
from tests import zoo
from tests.conftest import FAMILIES, tiny_llama, tiny_settings
from tests.helpers import gate_tensors, same, tensors_of
from tests.tokenizers import sentencepiece_like
from tests.tolerances import LEVERAGE_FLOAT32

pytestmark = pytest.mark.usefixtures("few_ordinary_keys")

KEPT = ("context_templates", "lambda_reg", "mu_reg", "mom2_adjustment", "v_num_grad_steps", "max_deviation")


def closed_texts(model, tok, texts):
    """Those of the texts no token of which is open."""
    decision = next(module for module in model.modules() if type(module).__name__ == "Decision")
    found = []
    for text in texts:
        with torch.no_grad():
            model(**tok(text, return_tensors="pt"))
        found += [] if bool(decision.open.any()) else [text]
    return found


def test_a_text_that_opens_no_gate_has_the_unedited_logits(
    model, family, tok, requests, gated, logits, demo_text
):
    unedited, weights = FAMILIES[family](), tensors_of(model)
    editor = RLSEditor(model, tok, gated())
    report = editor.edit(requests)
    assert same(tensors_of_model(model), weights)  # none of the model's own was written
    words = demo_text.split()
    texts = [" ".join(words[at : at + 3]) for at in range(0, 300, 3)]
    closed = closed_texts(model, tok, texts)
    assert len(closed) > 10
    for text in closed:
        assert torch.equal(logits(model, text), logits(unedited, text))
    prompt = requests[0]["prompt"].format(requests[0]["subject"])
    assert not torch.equal(logits(model, prompt), logits(unedited, prompt))
    assert report.n_edits == len(requests)
    editor.retract(range(1, len(requests) + 1))
    for text in [*texts, prompt]:
        assert torch.equal(logits(model, text), logits(unedited, text))


def tensors_of_model(model):
    with pytest.warns(UserWarning, match="edits stand behind gates"):
        return tensors_of(model)


def test_the_gate_is_the_plain_formula(model, tok, requests, gated, tmp_path):
    """g from the covariances, solved plainly in float64 from the keys that the ledger holds."""
    hp = gated(state_dir=str(tmp_path))
    with RLSEditor(model, tok, hp) as editor:
        for request in requests:
            editor.edit({**request, "importance": 0.7})
        editor.retract([2])
        editor.edit({**requests[1], "target_new": "water"})
    layer = min(editor.layout.edited)
    K, _, D = read_history(latest(tmp_path)).tensors([1, 3, 4, 5], [layer])[layer]
    A_0 = editor.state.now.beginnings[layer].information(torch.device("cpu"))
    A_t = A_0 + K.double().T @ (D.double()[:, None] * K.double())
    keys = torch.cat(
        [K.double(), torch.randn(50, K.shape[1], generator=torch.Generator().manual_seed(0)).double()]
    )

    def variance(A):
        return (keys * torch.linalg.solve(A, keys.T).T).sum(1)

    rho = hp.gate_prior
    wanted = 1 - rho * variance(A_t - (1 - rho) * A_0) / variance(A_0)
    found = find_decision(editor.layout).leverage(keys.float())
    torch.testing.assert_close(found.double(), wanted, **LEVERAGE_FLOAT32)
    assert float(wanted[:4].min()) > float(wanted[4:].max())


@pytest.mark.parametrize("solver", ["rls", "forgetting", "memit_seq"])
def test_rules_with_a_covariance_have_a_gate(model, tok, requests, gated, solver):
    own = {"n_0": 50.0, "norm_weight": 1.0} if solver == "memit_seq" else {}
    editor = RLSEditor(model, tok, gated(solver=solver, solver_settings=own))
    editor.edit(requests[:2])
    before = gate_tensors(editor)
    editor.edit(requests[2:])
    assert not torch.equal(gate_tensors(editor)["factors"], before["factors"])
    editor.rollback()
    assert same(gate_tensors(editor), before)


def test_a_rule_without_a_covariance_is_refused():
    for solver in ("alphaedit", "rls-rect"):
        with pytest.raises(
            HyperParamsError, match=f"memory is 'gated'; allowed: 'weights' where solver is {solver}"
        ):
            tiny_settings("llama", memory="gated", solver=solver)


def test_reports_say_whose_gate_stays_closed(model, tok, requests, gated):
    editor = RLSEditor(model, tok, gated())
    report = editor.edit(requests)
    decision = find_decision(editor.layout)
    assert all(fact.is_open == (fact.leverage > decision.threshold) for fact in report.facts)
    assert any(fact.is_open for fact in report.facts)
    editor.rollback()
    strict = RLSEditor(model, tok, gated(gate_prior=1.0, lambda_reg=100.0, layers=[2]))
    with pytest.warns(UnsaidWarning, match=r"The gate stays closed for \d.*raise gate_share_most \(0.001\)"):
        strict.edit({**requests[0], "importance": 1e-6})


def test_a_part_of_a_pass_is_refused(model, family, tok, requests, gated):
    """A layer above the gate's that is run by itself does not go by an older decision."""
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests)
    upper = editor.layout.edited[max(editor.layout.edited)]
    with pytest.raises(GateError, match="saw other tokens"):
        upper.module(torch.randn(1, 91, upper.shape[0]))
    length = 7
    with torch.no_grad():
        model(torch.arange(length)[None])
    with torch.no_grad(), pytest.raises(GateError, match="saw other tokens"):  # as many, but it was over
        upper.module(torch.randn(1, length, upper.shape[0]))


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family_has_its_gate(name, tok, requests, logits, demo_text):
    """Bit for bit the unedited logits where no token is open, and everywhere once the edits are retracted."""
    model, unedited = zoo.make(name), zoo.make(name)
    own = {key: value for key, value in tiny_settings("llama").to_dict().items() if key in KEPT}
    hp = RLSEditHyperParams.for_model(model, **own, memory="gated", gate_share=0.01)
    editor = RLSEditor(model, tok, hp)
    editor.edit(requests[:2])
    words = demo_text.split()
    texts = [" ".join(words[at : at + 3]) for at in range(0, 90, 3)]
    prompts = [request["prompt"].format(request["subject"]) for request in requests[:2]]
    closed = closed_texts(model, tok, texts)
    assert len(closed) > 3
    assert all(torch.equal(logits(model, text), logits(unedited, text)) for text in closed)
    assert not any(torch.equal(logits(model, text), logits(unedited, text)) for text in prompts)
    editor.retract([1, 2])
    assert all(torch.equal(logits(model, text), logits(unedited, text)) for text in [*texts, *prompts])


def test_the_threshold_is_taken_anew_as_edits_grow(model, tok, requests, gated):
    """It is the quantile of the leverage that ordinary tokens have now."""
    editor = RLSEditor(model, tok, gated())
    seen = set()
    for number, request in enumerate(requests, 1):
        editor.edit(request)
        decision, layer = find_decision(editor.layout), min(editor.layout.edited)
        g = decision.leverage(ordinary_keys(model, tok, editor.layout, layer, editor.hparams))
        assert editor.memory.gate.edits == number
        assert decision.threshold == pytest.approx(float(g.double().quantile(0.99)), abs=1e-5)
        seen.add(decision.threshold)
    assert len(seen) == len(requests)


def test_the_layer_that_the_gate_goes_by_is_in_float64(model, tok, requests, gated):
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests[:2])
    dtypes = [solution.weight.dtype for _, solution in sorted(editor.state.layers.items())]
    assert dtypes == [torch.float64, *[torch.float32] * (len(dtypes) - 1)]


def test_values_at_the_first_layer_are_found_behind_the_gate(model, family, tok, requests, gated):
    """The layers above the gate's run by themselves then, and go by the decision that was taken below."""
    plain = RLSEditor(FAMILIES[family](), tok, tiny_settings(family, targets="first_layer"))
    editor = RLSEditor(model, tok, gated(targets="first_layer"))
    told, wanted = editor.edit(requests[:2]), plain.edit(requests[:2])  # nothing is behind the gate yet
    for one, other in zip(told.facts, wanted.facts):
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
        assert one.value_change == pytest.approx(other.value_change, rel=1e-4)
    assert all(fact.is_open and fact.miss < 0.5 for fact in editor.edit(requests[2:]).facts)
    upper = editor.layout.edited[max(editor.layout.edited)]
    with torch.no_grad(), pytest.raises(GateError, match="saw other tokens"):  # no decision is left over
        upper.module(torch.randn(1, 3, upper.shape[0]))


def test_first_layer_values_of_a_family_that_flattens_its_tokens(tok, requests):
    own = {key: value for key, value in tiny_settings("llama").to_dict().items() if key in KEPT}
    model = zoo.make("opt")
    hp = RLSEditHyperParams.for_model(
        model, **own, memory="gated", gate_share=0.01, targets="first_layer", early_stopping="off"
    )
    editor = RLSEditor(model, tok, hp)
    editor.edit(requests[:2])
    assert all(fact.is_open for fact in editor.edit(requests[2:]).facts)


def test_start_tokens_are_not_ordinary(demo_text, monkeypatch):
    """Each row of text has one in front, whose key is like no other's."""
    tok, model = sentencepiece_like(demo_text), tiny_llama(900)
    hp = tiny_settings("llama", mom2_n_samples=4)
    keys = ordinary_keys(model, tok, find_layout(model, hp), 1, hp)
    rows = [row for block in token_blocks(model, tok, hp) for row in block]
    assert len(keys) == sum(len(row) - 1 for row in rows)
    with torch.no_grad(), tap(inputs={0: model.model.layers[1].mlp.down_proj}) as seen:
        model(torch.tensor([rows[0]]))
    assert float((keys - seen[0][0, 0]).norm(dim=1).min()) > 1e-3
    assert float((keys - seen[0][0, 1]).norm(dim=1).min()) < 1e-4
