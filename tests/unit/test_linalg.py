"""Linear algebra against its dense twins."""

import pytest
import torch

from easyedit_rls.errors import NumericalError
from easyedit_rls.solvers import spd as linalg
from tests.tolerances import FLOAT32_SUM, FLOAT64, FLOAT64_SUM


def spd(n: int, seed: int = 0) -> torch.Tensor:
    X = torch.randn(2 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return X.T @ X / n + torch.eye(n, dtype=torch.float64)


def test_cholesky_rebuilds_the_matrix():
    A = spd(7)
    L = linalg.cholesky(A)
    torch.testing.assert_close(L @ L.T, A, rtol=FLOAT64, atol=0)
    assert torch.equal(L, L.tril())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_cholesky_names_non_finite_entries_before_trying(bad):
    A = spd(4)
    A[0, 3] = bad  # above the diagonal, where the factorisation itself would never look
    with pytest.raises(NumericalError, match="Prior of layer 5 holds NaN"):
        linalg.cholesky(A, "Prior of layer 5")


def test_cholesky_refuses_an_indefinite_matrix_and_names_the_cure():
    A = torch.diag(torch.tensor([1.0, -1e-3, 1.0]))
    with pytest.raises(NumericalError, match=r"minor 2 of 3.*Raise lambda_reg"):
        linalg.cholesky(A)


def test_inverse_is_exactly_symmetric_and_right():
    A = spd(9)
    C = linalg.spd_inverse(A)
    assert torch.equal(C, C.T)
    torch.testing.assert_close(C @ A, torch.eye(9, dtype=torch.float64), rtol=0, atol=FLOAT64)


@pytest.mark.parametrize("n", [1, 5, 1024, 1500])
def test_symmetrize_in_place_equals_the_dense_mean(n):
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    mean = (M + M.T) / 2
    result = linalg.symmetrize_(M)
    assert result is M
    assert torch.equal(M, mean)


def test_innovation_factor_is_that_of_s():
    C, K, d = (
        spd(6),
        torch.randn(3, 6, dtype=torch.float64),
        torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64),
    )
    L = linalg.innovation_factor(K, C @ K.T, d)
    torch.testing.assert_close(L @ L.T, torch.diag(1 / d) + K @ C @ K.T, rtol=FLOAT64, atol=FLOAT64)


def test_innovation_factor_tells_when_c_is_no_longer_definite():
    K = torch.eye(3)
    with pytest.raises(NumericalError, match="lost positive definiteness"):
        linalg.innovation_factor(K, -5 * K, torch.ones(3))


def test_drift_is_zero_for_the_inverse_and_grows_with_the_error():
    A, Z = spd(6), torch.randn(6, 8, dtype=torch.float64)
    C = linalg.spd_inverse(A)
    assert linalg.information_drift(C @ (A @ Z), Z) < FLOAT64_SUM
    assert linalg.information_drift(1.01 * C @ (A @ Z), Z) == pytest.approx(0.01, rel=FLOAT32_SUM)
