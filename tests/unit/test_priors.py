"""The anchor's second moments, with and without extra weight where ordinary keys are."""

import pytest
import torch

from easyedit_rls.anchors.prior import _moment_gram
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.conftest import tiny_settings
from tests.tolerances import BATCHES, FLOAT64

D_K, D_V = 12, 5


@pytest.fixture
def moment():
    """E[kkᵀ] with eigenvalues from far below the threshold to far above it, and its eigenvectors."""
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(D_K, D_K, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(-4, 0, D_K, dtype=torch.float64)
    return (vectors * eigenvalues) @ vectors.T, eigenvalues, vectors


def settings(**changes):
    return tiny_settings("llama", mom2_update_weight=50.0, lambda_reg=1.0, **changes)


def test_without_the_weight_it_is_the_papers_prior(moment):
    mean, _, _ = moment
    assert torch.equal(_moment_gram(mean, settings()), 50 * mean)


def test_ordinary_directions_weigh_more(moment):
    mean, eigenvalues, vectors = moment
    gram = _moment_gram(mean, settings(nullspace_weight=1e4, nullspace_threshold=0.02))
    expected = 50 * eigenvalues + 1e4 * (eigenvalues >= 0.02)
    assert torch.allclose((vectors.T @ gram @ vectors).diagonal(), expected, rtol=FLOAT64)
    assert torch.allclose(gram, (vectors * expected) @ vectors.T, rtol=FLOAT64, atol=FLOAT64)
    assert 0 < int((eigenvalues >= 0.02).sum()) < D_K


def test_alphaedit_is_the_limit(moment):
    """Its update of one batch (arXiv 2410.02355), ``(P KᵀK + L2 I)⁻¹ P Kᵀ R`` with P onto the other
    directions; n_0 = 0, λ² = L2.
    """
    mean, eigenvalues, vectors = moment
    K, R, W = torch.randn(4, D_K).double(), torch.randn(4, D_V).double(), torch.randn(D_K, D_V).double()
    others = vectors[:, eigenvalues < 0.02]
    P = others @ others.T
    expected = torch.linalg.solve(P @ K.T @ K + torch.eye(D_K, dtype=torch.float64), P @ K.T @ R)
    hp = tiny_settings(
        "llama", mom2_update_weight=0.0, lambda_reg=1.0, nullspace_weight=1e8, nullspace_threshold=0.02
    )
    solution = RecursiveLeastSquares(Prior(W, _moment_gram(mean, hp), lambda_reg=1.0, mu_reg=1.0))
    solution = solution.update(K, K @ W + R)
    assert torch.allclose(solution.weight - W, expected, **BATCHES)
