"""The recursion against the float64 batch solution: any split, regularizers, importances, retractions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_rls.errors import NumericalError
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.property.conftest import Problem, assert_close, problems, splits
from tests.tolerances import FEW_EDITS_DRIFT, FLOAT32, FLOAT64, LONG_STREAM_FLOAT32, RETRACTION, RETRACTIONS


@settings(deadline=None, max_examples=150)
@given(problem=problems, data=st.data())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FLOAT64), (torch.float32, FLOAT32)])
def test_any_split_gives_the_batch_solution(problem, data, dtype, tolerance):
    state = problem.state(dtype)
    for start, end in splits(data, len(problem.K)):
        state = problem.feed(state, start, end)
        assert_close(state.weight, problem.solution(slice(0, end)), tolerance)
    A = problem.information(slice(None))
    assert_close(state.covariance(), torch.linalg.solve(A, torch.eye(len(A), dtype=torch.float64)), tolerance)
    assert state.n_edits == len(problem.K)


def test_the_batch_solution_depends_on_each_term():
    """The twin: what the property test compares with is not insensitive to what it tests."""
    base = Problem(0, 10, "both", True, "pairs")
    for change in ("lam", "mu"):
        other = Problem(0, 10, "both", True, "pairs")
        setattr(other, change, 1.5 * getattr(other, change))
        assert float((other.solution() - base.solution()).norm() / base.solution().norm()) > 1e-3
    unweighted = Problem(0, 10, "both", True, "pairs")
    unweighted.d = torch.ones_like(unweighted.d)
    assert float((unweighted.solution() - base.solution()).norm() / base.solution().norm()) > 1e-3


@settings(deadline=None, max_examples=60)
@given(problem=problems, data=st.data())
def test_retraction_equals_never_having_edited(problem, data):
    n = len(problem.K)
    state = problem.state()
    for start, end in splits(data, n):
        state = problem.feed(state, start, end)
    gone = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1), label="gone"))
    kept = [i for i in range(n) if i not in gone]
    for i in data.draw(st.permutations(gone), label="order"):
        state = state.retract(problem.K[i : i + 1], problem.V[i : i + 1], problem.d[i : i + 1])
    assert_close(state.weight, problem.solution(kept), RETRACTIONS)
    assert state.n_edits == len(kept)
    assert state.drift() < RETRACTIONS


def test_retracting_what_was_never_edited_is_refused():
    problem = Problem(0, 5, "lambda", False, "moments")
    state = problem.state()
    with pytest.raises(NumericalError, match="not part of the state"):
        state.retract(10 * problem.K, problem.V)


@pytest.mark.parametrize(("lam", "n_0"), [(1.0, 0.0), (0.0, 100.0), (0.1, 10.0)])
def test_ten_thousand_batches_in_float32(lam, n_0):
    d_k, d_v, g = 256, 8, torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -1.5, d_k)  # keys of real text are far from isotropic
    text = torch.randn(2000, d_k, generator=g) * spectrum
    gram, W_0 = n_0 * text.T @ text / len(text), torch.randn(d_k, d_v, generator=g)
    state = RecursiveLeastSquares(Prior(W_0, gram, lambda_reg=lam, mu_reg=1.0))
    A = lam**2 * torch.eye(d_k, dtype=torch.float64) + gram.double()
    right = A @ W_0.double()
    for _ in range(10_000):
        K, V = torch.randn(2, d_k, generator=g), torch.randn(2, d_v, generator=g)
        state = state.update(K, V)
        A += K.double().T @ K.double()
        right += K.double().T @ V.double()
    assert_close(state.weight, torch.linalg.solve(A, right), LONG_STREAM_FLOAT32)
    C = state.covariance()
    assert torch.equal(C, C.T)
    assert float(torch.linalg.eigvalsh(C.double()).min()) > 0
    assert state.drift() < LONG_STREAM_FLOAT32


def test_drift_rises_when_the_covariance_is_spoiled():
    problem = Problem(1, 20, "both", False, "moments")
    state = problem.state(torch.float32)
    state = problem.feed(state, 0, 10)
    state = problem.feed(state, 10, 20)
    sound = state.drift()
    assert sound < FEW_EDITS_DRIFT
    C = state._parts.C
    C.panels[0][2, 3] += 0.05 * C.to_dense().abs().max()
    assert problem.feed(state, 0, 1).drift() > 100 * sound


def test_singular_prior_names_layer_and_cure():
    keys = torch.ones(3, 6)
    with pytest.raises(NumericalError, match=r"Prior of layer 5 \(d_k=6, lambda_reg=0.*Raise lambda_reg"):
        RecursiveLeastSquares(
            Prior(torch.ones(6, 2), keys.T @ keys, lambda_reg=0.0, mu_reg=1.0, name="layer 5")
        )


@settings(deadline=None, max_examples=100)
@given(problem=problems, data=st.data())
def test_retracting_an_edit_is_as_before_it(problem, data):
    n = len(problem.K)
    cut = data.draw(st.integers(1, n - 1))
    state = problem.state()
    state = problem.feed(state, 0, cut)
    weight, covariance = state.weight.clone(), state.covariance()
    state = problem.feed(state, cut, n)
    state = state.retract(problem.K[cut:], problem.V[cut:], problem.d[cut:])
    assert_close(state.weight, weight, RETRACTION)
    assert_close(state.covariance(), covariance, RETRACTION)
    assert state.n_edits == cut


@settings(deadline=None, max_examples=60)
@given(problem=problems, data=st.data())
def test_amending_is_retracting_and_editing(problem, data):
    n = len(problem.K)
    cut = data.draw(st.integers(1, n - 1))
    old = data.draw(st.integers(0, cut - 1))
    state = problem.state()
    state = problem.feed(state, 0, cut)
    weight, covariance = state.weight.clone(), state.covariance()
    changed = state.retract(*(tensor[old : old + 1] for tensor in (problem.K, problem.V, problem.d)))
    changed = problem.feed(changed, cut, n, same_change=True)
    kept = [i for i in range(n) if i != old]
    assert_close(changed.weight, problem.solution(kept), RETRACTION)
    assert changed.n_edits == n - 1
    assert torch.equal(state.weight, weight)
    assert torch.equal(state.covariance(), covariance)


def test_an_edit_may_have_several_rows():
    problem = Problem(0, 12, "both", False, "moments")
    K, V, d = (tensor.unflatten(0, (4, 3)) for tensor in (problem.K, problem.V, problem.d))
    state = problem.state()
    state = state.update(K[:2], V[:2], d[:2]).update(K[2:], V[2:], d[2:])
    assert state.n_edits == 4
    assert_close(state.weight, problem.solution(), FLOAT64)
    state = state.retract(K[1:2], V[1:2], d[1:2])
    assert state.n_edits == 3
    assert_close(state.weight, problem.solution([0, 1, 2, *range(6, 12)]), RETRACTION)
    even = problem.state()
    even = even.update(K, V)  # without importances every row counts one
    assert_close(even.weight, problem.solution(), FLOAT64)


def test_the_covariance_form_refuses_to_forget():
    problem = Problem(0, 5, "lambda", False, "moments")
    with pytest.raises(NumericalError, match="can't forget"):
        problem.state().update(problem.K, problem.V, factor=0.9)
