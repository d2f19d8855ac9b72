"""`keys: each`: every context template's key is a row of its own in the objective, in memory, on disk and
when taken back.
"""

import pytest
import torch

from easyedit_rls import StateMismatchError
from easyedit_rls.compare.objective import Objective
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.facts.keys import LayerWalk, locate_facts
from easyedit_rls.ledger.inspect import layer_figures
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.rebuild import rebuilt
from easyedit_rls.ledger.snapshot import read_manifest, read_prior
from easyedit_rls.model.hooks import tap
from tests.helpers import FADING
from tests.tolerances import FLOAT32, REBUILT, WEIGHTS

TEMPLATES = ["The well is old. ", "Leaves fall. ", "He said: "]


@pytest.fixture
def each(settings):
    """Settings with three templates before the prompt, so four rows a fact."""
    return lambda **changes: settings(**{"context_templates": TEMPLATES, "keys": "each", **changes})


def solved(prior, history, layer):
    """The float64 solution of one layer from its unedited weight,
    prior covariance and all rows that stand.
    """
    K, V, D = (tensor.double() for tensor in history.tensors(history.live, [layer])[layer])
    K, V, D = K.reshape(-1, K.shape[-1]), V.reshape(-1, V.shape[-1]), D.reshape(-1)
    W_0, A = prior.unedited.double(), torch.linalg.inv(prior.solution.covariance().double())
    return W_0, W_0 + torch.linalg.solve(A + K.T @ (D[:, None] * K), K.T @ (D[:, None] * (V - K @ W_0)))


def test_rows_are_the_templates_own_keys_and_their_shares_make_the_mean(fresh, tok, requests, each):
    editor = fresh(each())
    weighted = [{**request, "importance": 1.0 + i} for i, request in enumerate(requests)]
    facts = locate_facts(tok, parse_requests(weighted), TEMPLATES)
    walks = {keys: LayerWalk(editor.model, editor.layout, facts, 10_000, keys) for keys in ("mean", "each")}
    rows, means = walks["each"].advance_to(1), walks["mean"].advance_to(1)
    assert rows.shape == (len(facts), 4, means.shape[1])
    assert walks["mean"].importance.tolist() == [1.0, 2.0, 3.0, 4.0]
    shares = walks["each"].importance
    torch.testing.assert_close(shares[1], torch.tensor([1.0, 1 / 3, 1 / 3, 1 / 3]))
    torch.testing.assert_close((shares[..., None] * rows).sum(1) / shares.sum(1, keepdim=True), means)
    for fact, keys in zip(facts, rows):
        for row, key in zip(fact.rows, keys):
            with torch.no_grad(), tap(inputs={"key": editor.layout.edited[1].module}) as seen:
                editor.model(torch.tensor([row.ids[: row.place + 1]]))
            torch.testing.assert_close(seen["key"].reshape(-1, key.shape[0])[-1], key, **WEIGHTS)


def test_the_bare_prompt_and_every_template_are_written(fresh, tok, requests, each):
    """With a weak prior every row reaches its target, where of the mean only the mean does."""
    facts = locate_facts(tok, parse_requests(requests), TEMPLATES)
    misses = {}
    for keys in ("mean", "each"):
        editor = fresh(each(mom2_update_weight=0.01, keys=keys))
        W_0 = editor.layout.edited[1].read()
        rows, given = (
            LayerWalk(editor.model, editor.layout, facts, 10_000, how).advance_to(1) for how in ("each", keys)
        )
        editor.edit(requests)
        V = editor.state.history.tensors([1, 2, 3, 4], [1])[1][1]
        wanted = (V - given @ W_0).reshape(len(facts), -1, V.shape[-1])  # the same for all rows of a fact
        missed = rows @ (editor.layout.edited[1].read() - W_0) - wanted
        misses[keys] = float((missed.norm(dim=-1) / wanted.norm(dim=-1)).max())
    assert misses["each"] < 0.2
    assert misses["mean"] > 3 * misses["each"]


@pytest.mark.parametrize("forgetting", [{}, FADING["adaptive"]])
def test_the_ledger_keeps_every_row(fresh, requests, each, tmp_path, forgetting):
    hp = each(**forgetting)
    stored, alone = fresh(hp, tmp_path), fresh(hp)
    for editor in (stored, alone):
        assert editor.edit(requests[:3]).n_edits == 3
        editor.edit(requests[3:])
        editor.retract([2])
        assert editor.amend(1, {**requests[0], "target_new": "water"}).n_edits == 3
        assert len(editor.state.history.live) == 3
    for layer, solution in stored.state.layers.items():
        W_0, exact = solved(read_prior(latest(tmp_path), layer), stored.state.history, layer)
        assert float((solution.weight - exact).norm() / (exact - W_0).norm()) < 10 * FLOAT32
    stored.close()
    resumed = fresh(hp, tmp_path)
    assert resumed.n_edits == 3
    for editor in (alone, resumed):
        editor.rollback()
        assert editor.n_edits == 3
        assert 1 in editor.state.history.live
    for layer, solution in alone.state.layers.items():
        assert torch.equal(solution.weight, resumed.state.layers[layer].weight)
        assert torch.equal(solution.covariance(), resumed.state.layers[layer].covariance())


def test_the_objective_counts_every_row(fresh, tok, requests, each, tmp_path):
    hp = each()
    editor = fresh(hp, tmp_path)
    objective = Objective(editor.model, tok, hp)
    editor.edit(requests)
    total = 0.0
    for layer, solution in editor.state.layers.items():
        K, V, D = (
            tensor.double()
            for tensor in editor.state.history.tensors(editor.state.history.live, [layer])[layer]
        )
        W = solution.weight.double()
        missed = sum(
            float(D[i, r] * (K[i, r] @ W - V[i, r]).square().sum())
            for i in range(len(K))
            for r in range(K.shape[1])
        )
        journal = latest(tmp_path)
        figures = layer_figures(
            read_prior(journal, layer), solution, editor.state.history, layer, read_manifest(journal)
        )
        assert figures.edits_term == pytest.approx(missed, rel=FLOAT32)
        total += missed
    assert objective.terms(editor.model, editor)["edits"] == pytest.approx(total, rel=FLOAT32)


def test_a_covariance_is_rebuilt_from_every_row(fresh, requests, each, tmp_path):
    editor = fresh(each(), tmp_path)
    editor.edit(requests)
    editor.retract([3])
    for layer, solution in editor.state.layers.items():
        again = rebuilt(read_prior(latest(tmp_path), layer).beginning, solution, editor.state.history, layer)
        assert again.n_edits == 3
        torch.testing.assert_close(again.weight.float(), solution.weight, **REBUILT)
        torch.testing.assert_close(again.covariance().float(), solution.covariance(), **REBUILT)


def test_a_ledger_of_means_is_not_gone_on_with(fresh, requests, each, tmp_path):
    editor = fresh(each(keys="mean"), tmp_path)
    editor.edit(requests[:1])
    editor.close()
    with pytest.raises(StateMismatchError, match="keys: the ledger has 'mean', here it is 'each'"):
        fresh(each(), tmp_path)
