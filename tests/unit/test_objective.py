"""The objective is its formula, with the anchors written out."""

import pytest
import torch

from easyedit_rls.evaluation.objective import objective

D_K, D_V, LAMBDA, MU = 5, 3, 0.7, 1.3


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    edits = [(draw(u, D_K), draw(u, D_V), draw(u).abs()) for u in (1, 4)]
    edits.append((draw(2, 3, D_K), draw(2, 3, D_V), draw(2, 3).abs()))  # a row for each of three templates
    return draw(D_K, D_V), draw(D_K, D_V), edits, draw(7, D_K), draw(7, D_V)


@pytest.mark.parametrize("has_values", [False, True])
def test_the_terms_are_the_formula(problem, has_values):
    W, W_0, edits, K_0, own = problem
    V_0 = own if has_values else K_0 @ W_0
    extra = (K_0.T @ V_0, float(V_0.square().sum())) if has_values else ()
    found = objective(W, W_0, iter(edits), K_0.T @ K_0, LAMBDA, MU, *extra)
    rows = [row for K, V, D in edits for row in zip(K.reshape(-1, D_K), V.reshape(-1, D_V), D.flatten())]
    missed = sum(float(d) * float((k @ W - v).norm()) ** 2 for k, v, d in rows)
    assert found.edits == pytest.approx(missed)
    assert found.deviation == pytest.approx(LAMBDA**2 * float((W - W_0).norm()) ** 2)
    assert found.anchors == pytest.approx(MU**2 * float((K_0 @ W - V_0).norm()) ** 2)


def test_nothing_that_is_absent_counts(problem):
    W, W_0, edits, K_0, _ = problem
    found = objective(W, W_0, [], None, LAMBDA, MU)
    assert (found.edits, found.anchors) == (0.0, 0.0)
    assert found.deviation > 0
    at_start = objective(W_0, W_0, edits, K_0.T @ K_0, LAMBDA, MU)
    assert (at_start.deviation, at_start.anchors) == (0.0, 0.0)
    assert at_start.edits > 0


def test_it_is_computed_as_exactly_as_the_weight(problem):
    W, W_0, edits, K_0, _ = problem
    exact = objective(W, W_0, edits, K_0.T @ K_0, LAMBDA, MU)
    rough = objective(W.float(), W_0, edits, K_0.T @ K_0, LAMBDA, MU)
    assert rough.edits == pytest.approx(exact.edits, rel=1e-5)
    assert rough.edits != exact.edits
