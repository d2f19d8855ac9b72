"""How full a layer's memory is: the exact figure, its estimate, and what is reported of it."""

import json
import warnings

import pytest
import torch

from easyedit_rls import RLSEditor
from easyedit_rls.cli.state import main as state
from easyedit_rls.errors import FillWarning
from easyedit_rls.solvers import fill
from easyedit_rls.solvers.batch import Beginning
from easyedit_rls.solvers.fill import Gauge, exact_fill
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rule import find_rule
from tests.conftest import tiny_settings

D_K, D_V, LAMBDA, MU = 96, 5, 0.3, 1.5


@pytest.fixture
def stream():
    """A prior with eigenvalues over three decades, and batches of keys like it."""
    g = torch.Generator().manual_seed(3)
    mixed = torch.linalg.qr(torch.randn(D_K, D_K, generator=g, dtype=torch.float64))[0]
    gram = (mixed * torch.logspace(-2, 1, D_K, dtype=torch.float64)) @ mixed.T
    batches = [torch.randn(8, D_K, generator=g, dtype=torch.float64) for _ in range(9)]
    W_0 = torch.randn(D_K, D_V, generator=g, dtype=torch.float64)
    return Prior(W_0, gram, LAMBDA, MU), batches


def begun(prior, rule="rls", **settings):
    packed = PackedSymmetric.from_dense(prior.gram, torch.float64)
    return find_rule(rule, settings).begin(prior), Beginning(packed, None, LAMBDA, MU, prior.W_0, None)


def plainly(prior, keys):
    """``1 − tr((A_0 + KᵀK)^-1 A_0)/d_k``."""
    A_0 = LAMBDA**2 * torch.eye(D_K, dtype=torch.float64) + MU**2 * prior.gram
    return 1 - float(torch.linalg.solve(A_0 + keys.T @ keys, A_0).trace()) / D_K


@pytest.mark.parametrize(("rule", "settings"), [("rls", {}), ("forgetting", {"factor": 1.0})])
def test_it_is_its_formula(stream, rule, settings):
    prior, batches = stream
    solution, beginning = begun(prior, rule, **settings)
    assert exact_fill(solution, beginning) == pytest.approx(0, abs=1e-10)
    for number, K in enumerate(batches, 1):
        solution = solution.update(K, K @ solution.weight + 1)
        expected = plainly(prior, torch.cat(batches[:number]))
        assert exact_fill(solution, beginning) == pytest.approx(expected, abs=1e-9)
    assert expected > 0.5


@pytest.mark.parametrize("rule", ["rls", "forgetting"])
def test_the_estimate_is_close_and_begins_at_nothing(stream, rule):
    prior, batches = stream
    solution, beginning = begun(prior, rule)
    gauge, beginnings = Gauge(), {4: beginning}
    assert gauge.read(solution, beginnings, 4) == pytest.approx(0, abs=1e-10)
    for K in batches:
        solution = solution.update(K, K @ solution.weight + 1)
        exact = exact_fill(solution, beginning)
        assert gauge.read(solution, beginnings, 4) == pytest.approx(exact, abs=3 * (2 / 16 / D_K) ** 0.5)
    if rule == "rls":
        for K in batches:
            solution = solution.retract(K, K @ solution.weight)
        assert gauge.read(solution, beginnings, 4) == pytest.approx(0, abs=1e-9)


def test_another_stream_has_probes_of_its_own(stream):
    prior, _ = stream
    gauge, (solution, beginning) = Gauge(), begun(prior)
    gauge.read(solution, {0: beginning}, 0)
    wider = Prior(prior.W_0, 9 * prior.gram, LAMBDA, MU)
    solution, beginning = begun(wider)
    assert gauge.read(solution, {0: beginning}, 0) == pytest.approx(0, abs=1e-10)


def test_rules_without_such_a_memory_have_none(stream):
    prior, _ = stream
    solution, beginning = begun(Prior(prior.W_0, prior.gram, LAMBDA, MU, None, prior.gram), "alphaedit")
    assert exact_fill(solution, beginning) is None
    assert Gauge().read(solution, {0: beginning}, 0) is None


def test_reports_and_state_show_tell_it(model, tok, family, requests, tmp_path, capsys):
    with RLSEditor(model, tok, tiny_settings(family), state_dir=tmp_path / "ledger") as editor:
        fills = [[layer.fill for layer in editor.edit([one]).layers] for one in requests[:3]]
    assert all(0 < early < late < 1 for early, late in zip(fills[0], fills[2]))
    assert state(["show", str(tmp_path / "ledger"), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["layers"]
    d_k = shown[0]["d_k"]
    assert [layer["fill"] for layer in shown] == pytest.approx(fills[2], abs=3 * (2 / 16 / d_k) ** 0.5)
    assert state(["show", str(tmp_path / "ledger")]) == 0
    assert "Fill" in capsys.readouterr().out


def test_a_layer_that_becomes_nearly_full_is_told_once(model, tok, family, requests):
    hparams = tiny_settings(family, lambda_reg=1e-3, mu_reg=0, max_deviation="off")
    editor, told = RLSEditor(model, tok, hparams), []
    for one in requests * 12:
        prompt = f"{len(told)}: {one['prompt']}"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FillWarning)
            report = editor.edit([{**one, "prompt": prompt}])
        fills = {layer.layer: layer.fill for layer in report.layers}
        told.append([str(one.message) for one in caught if one.category is FillWarning])
        if told[-1]:
            break
    assert not any(told[:-1])
    fullest = max(fills, key=fills.get)
    assert len(told[-1]) == 1
    assert f"have settled {fills[fullest]:.2f} of layer {fullest} (1 is full)" in told[-1][0]
    assert all(cure in told[-1][0] for cure in ("Retract", "rehearsal", "more layers", "forgetting"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FillWarning)
        editor.edit([{**requests[0], "prompt": f"Once more: {requests[0]['prompt']}"}])


def test_no_deviation_exceeds_its_bound(model, tok, family, requests, tmp_path, capsys):
    """‖W − W_0‖ ≤ √J(W_0)/λ, J(W_0) summed by hand."""
    hparams = tiny_settings(family, lambda_reg=3.0)
    with RLSEditor(model, tok, hparams, state_dir=tmp_path) as editor:
        editor.edit(requests[:2])
        editor.edit(requests[2:])
        unedited = editor.state.now.unedited
        standing = list(editor.state.history.standing(hparams.layers))
    assert state(["show", str(tmp_path), "--json"]) == 0
    for figures in json.loads(capsys.readouterr().out)["layers"]:
        W_0 = unedited[figures["layer"]].double()
        parts = (part[figures["layer"]] for part in standing)
        edits = (tuple(tensor.double() for tensor in part) for part in parts)
        J = sum(float((D[..., None] * (K @ W_0 - V).square()).sum()) for K, V, D in edits)
        assert figures["deviation_bound"] == pytest.approx(J**0.5 / 3 / float(W_0.norm()), rel=1e-6)
        assert 0 < figures["deviation"] <= figures["deviation_bound"]
    assert state(["show", str(tmp_path)]) == 0
    assert "deviation can exceed" in capsys.readouterr().out


def test_the_prior_is_looked_at_once_a_stream(model, tok, family, requests, tmp_path, monkeypatch):
    """Also where the ledger takes it over behind the first batch: it costs a decomposition."""
    drawn = []
    draw = fill._drawn
    monkeypatch.setattr(fill, "_drawn", lambda *args: drawn.append(1) or draw(*args))
    hparams = tiny_settings(family)
    with RLSEditor(model, tok, hparams, state_dir=tmp_path) as editor:
        for one in requests[:3]:
            editor.edit([one])
    assert len(drawn) == len(hparams.layers)
