"""The information form: no forgetting equals the recursion, forgetting equals the weighted batch solution."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_rls.errors import NumericalError
from easyedit_rls.solvers.forgetting import ForgettingLeastSquares, ForgettingSettings
from easyedit_rls.solvers.prior import Prior
from tests.property.conftest import Problem, assert_close, problems, splits
from tests.tolerances import FLOAT64, RETRACTION


def forgetting(problem, factor, dtype=torch.float64, memory=20.0):
    cross = None if problem.cross is None else problem.cross.to(dtype)
    own = ForgettingSettings(factor or "adaptive", memory)
    prior = Prior(
        problem.W_0.to(dtype), problem.gram.to(dtype), problem.lam, problem.mu, cross, name="layer 0"
    )
    return ForgettingLeastSquares(prior, own)


def feed(state, problem, start, end, **how):
    return state.update(problem.K[start:end], problem.V[start:end], problem.d[start:end], **how)


def fade(problem, parts, factors):
    """The problem with importances as they are after all batches."""
    for i, (start, end) in enumerate(parts):
        for factor in factors[i + 1 :]:
            problem.d[start:end] *= factor
    return problem


@settings(deadline=None, max_examples=60)
@given(problem=problems, data=st.data())
def test_a_factor_of_one_equals_no_forgetting(problem, data):
    state, plain = forgetting(problem, 1.0), problem.state()
    for start, end in splits(data, len(problem.K)):
        state, plain = feed(state, problem, start, end), problem.feed(plain, start, end)
        assert state.gamma == 1.0
        assert_close(state.weight, plain.weight, FLOAT64)
    assert_close(state.covariance(), plain.covariance(), FLOAT64)
    assert state.n_edits == plain.n_edits


@settings(deadline=None, max_examples=100)
@given(problem=problems, data=st.data(), factor=st.sampled_from([0.5, 0.9, 0.99, None]))
def test_forgetting_equals_the_weighted_batch_solution(problem, data, factor):
    """Both regularizers stay while the data fades; the adaptive rule gives some factors, and these count."""
    state, parts = forgetting(problem, factor), splits(data, len(problem.K))
    factors = []
    for start, end in parts:
        state = feed(state, problem, start, end)
        factors.append(state.gamma)
    assert all(0.5 <= given <= 1.0 for given in factors)
    assert factor is None or set(factors) == {factor}
    faded = fade(problem, parts, factors)
    assert_close(state.weight, faded.solution(), FLOAT64)
    A = faded.information(slice(None))
    assert_close(state.covariance(), torch.linalg.solve(A, torch.eye(len(A), dtype=torch.float64)), FLOAT64)
    assert state.drift() < FLOAT64


def test_the_adaptive_factor_falls_after_a_surprise():
    problem = Problem(0, 40, "both", False, "moments")
    problem.V = problem.K @ problem.W_0 + 0.1 * problem.V  # little to learn
    problem.V[30:35] += 3.0
    state = forgetting(problem, None, memory=100.0)
    factors = []
    for i in range(0, 40, 5):
        state = feed(state, problem, i, i + 5)
        factors.append(state.gamma)
    assert min(range(8), key=lambda i: factors[i]) == 6
    assert factors[0] == pytest.approx(1 - 5 / 100)  # the first batch is as surprising as usual
    assert factors[7] > factors[6]


@settings(deadline=None, max_examples=60)
@given(problem=problems, data=st.data(), factor=st.sampled_from([0.8, 1.0, None]))
def test_retraction_takes_out_what_is_left(problem, data, factor):
    n = len(problem.K)
    state, parts = forgetting(problem, factor), splits(data, n)
    factors = []
    for start, end in parts:
        state = feed(state, problem, start, end)
        factors.append(state.gamma)
    faded = fade(problem, parts, factors)
    gone = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1), label="gone"))
    for i in data.draw(st.permutations(gone), label="order"):
        state = state.retract(faded.K[i : i + 1], faded.V[i : i + 1], faded.d[i : i + 1])
    kept = [i for i in range(n) if i not in gone]
    assert_close(state.weight, faded.solution(kept), RETRACTION)
    assert state.n_edits == len(kept)


@settings(deadline=None, max_examples=40)
@given(problem=problems, data=st.data(), factor=st.sampled_from([0.9, None]))
def test_values_and_storage_are_bit_for_bit(problem, data, factor):
    n = len(problem.K)
    cut = data.draw(st.integers(1, n - 1))
    state = forgetting(problem, factor, torch.float32)
    before = feed(state, problem, 0, cut)
    weight, covariance, drift = before.weight.clone(), before.covariance(), before.drift()
    now = feed(before.retract(problem.K[:1], problem.V[:1], problem.d[:1]), problem, cut, n, same_change=True)
    assert torch.equal(before.weight, weight)
    assert torch.equal(before.covariance(), covariance)
    stored = {name: tensor.clone() for name, tensor in now.tensors(before).items()}
    for other, one in zip(ForgettingLeastSquares.from_tensors(stored, "layer 0"), (now, before), strict=True):
        assert torch.equal(other.weight, one.weight)
        assert torch.equal(other.covariance(), one.covariance())
        assert other.drift() == one.drift()
        after, expected = feed(other, problem, cut, n), feed(one, problem, cut, n)
        assert after.gamma == expected.gamma
        assert torch.equal(after.weight, expected.weight)
        assert torch.equal(after.covariance(), expected.covariance())
    assert before.drift() == drift


@pytest.mark.parametrize("factor", [0.9, None])
def test_rows_that_share_an_importance_weigh_and_fade_as_one(factor):
    problem = Problem(0, 12, "both", False, "moments")
    one, three = forgetting(problem, factor), forgetting(problem, factor)
    K, V, d = problem.K, problem.V, problem.d
    for i in range(0, 12, 4):
        batch = slice(i, i + 4)
        rows = [tensor[batch, None].expand(-1, 3, *tensor.shape[1:]) for tensor in (K, V, d / 3)]
        one, three = one.update(K[batch], V[batch], d[batch]), three.update(*rows)
        assert three.gamma == pytest.approx(one.gamma)
    three = three.retract(*(tensor[:1, None].expand(-1, 3, *tensor.shape[1:]) for tensor in (K, V, d / 30)))
    one = one.retract(K[:1], V[:1], d[:1] / 10)
    assert one.n_edits == three.n_edits == 11
    assert_close(three.weight, one.weight, FLOAT64)


def test_faults_change_nothing():
    problem = Problem(2, 8, "lambda", True, "moments")
    state = forgetting(problem, 0.9)
    state = feed(state, problem, 0, 4)
    weight = state.weight.clone()
    with pytest.raises(NumericalError, match="not part of the state"):
        state.retract(100 * problem.K, problem.V)
    problem.V[5] = float("nan")
    with pytest.raises(NumericalError, match="Target outputs of layer 0 hold NaN"):
        feed(state, problem, 4, 8)
    assert torch.equal(state.weight, weight)


def test_a_change_that_came_to_nothing_leaves_what_is_stored_as_it_was():
    problem = Problem(0, 12, "both", False, "moments")
    before = feed(forgetting(problem, 0.9), problem, 0, 4)
    now = feed(before, problem, 4, 8)
    stored = {name: tensor.clone() for name, tensor in now.tensors(before).items()}
    feed(now, problem, 8, 12)
    again = now.tensors(before)
    assert stored.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in stored.items())
