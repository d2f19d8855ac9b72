"""The recursion's state: no later change, fault or store alters it, and its covariance is symmetric."""

import copy
import sys
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from easyedit_rls.errors import NumericalError
from easyedit_rls.ledger.change import DRIFT_TOLERANCE
from easyedit_rls.solvers import packed as symmetric
from easyedit_rls.solvers.packed import PackedSymmetric, Term
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.property.conftest import Problem, assert_close, problems
from tests.tolerances import FLOAT32, FLOAT64


@settings(deadline=None, max_examples=60)
@given(problem=problems, data=st.data())
def test_a_change_leaves_the_solution_before_it_as_it_was(problem, data):
    n = len(problem.K)
    cut = data.draw(st.integers(1, n - 1))
    before = problem.feed(problem.state(torch.float32), 0, cut)
    weight, covariance, drift = before.weight.clone(), before.covariance(), before.drift()
    after = problem.feed(before, cut, n)
    assert not torch.equal(after.weight, weight)
    assert torch.equal(before.weight, weight)
    assert torch.equal(before.covariance(), covariance)
    assert before.drift() == drift
    assert before.n_edits == cut
    again = problem.feed(before, cut, n)  # bit for bit, whatever went before
    assert torch.equal(again.weight, after.weight)
    assert torch.equal(again.covariance(), after.covariance())


def test_each_downdate_makes_the_covariance_symmetric():
    problem = Problem(5, 8, "both", False, "moments")
    state = problem.state(torch.float32)
    state._parts.C.panels[0][0, 1] += (
        1e-6  # what a matrix product that rounds its two triangles differently would leave
    )
    for cut in (0, 2, 4, 6):
        state = problem.feed(state, cut, cut + 2)
        assert torch.equal(state.covariance(), state.covariance().T)
    assert torch.equal(state._parts.C.to_dense(), state._parts.C.to_dense().T)


@pytest.mark.parametrize("field", ["K", "V", "d"])
def test_non_finite_input_changes_nothing(field):
    problem = Problem(2, 8, "both", True, "moments")
    state = problem.state()
    state = problem.feed(state, 0, 4)
    weight, covariance = state.weight.clone(), state.covariance()
    getattr(problem, field)[5] = float("nan")
    with pytest.raises(NumericalError, match="layer 0 hold NaN"):
        state = problem.feed(state, 4, 8)
    assert torch.equal(state.weight, weight)
    assert torch.equal(state.covariance(), covariance)


def test_adopting_a_weight_keeps_the_covariance():
    problem = Problem(3, 10, "both", False, "moments")
    state = problem.state()
    state = problem.feed(state, 0, 5)
    covariance, other = state.covariance(), torch.randn_like(problem.W_0)
    state = state.adopt(other)
    torch.testing.assert_close(state.covariance(), covariance, rtol=FLOAT64, atol=0)
    assert torch.equal(state.weight, other)
    assert state.weight is not other


class Fault(Exception):
    pass


@pytest.mark.parametrize("n_good", range(0, 40, 3))
def test_a_pass_that_breaks_off_is_made_up_for(n_good, monkeypatch):
    """Faults before and behind each addition to a panel; three panels, two terms."""
    g = torch.Generator().manual_seed(0)
    K, V, W_0 = (
        torch.randn(50, 1100, generator=g),
        torch.randn(50, 3, generator=g),
        torch.randn(1100, 3, generator=g),
    )

    def stream(upset):
        state, found = RecursiveLeastSquares(Prior(W_0, None, lambda_reg=3.0, mu_reg=1.0)), []
        for start in range(0, 50, 10):
            for attempt in range(20):
                try:
                    found.append(upset(partial(state.update, K[start : start + 10], V[start : start + 10])))
                    break
                except Fault:
                    assert attempt < 19
            state = found[-1]
        return found

    calm = stream(lambda update: update())
    count = [0]
    real = {name: getattr(symmetric, name) for name in ("partial", "symmetrize_")}

    def failing(name):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] % 7 == n_good % 7 and count[0] > n_good:
                raise Fault
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(symmetric, name, failing(name))
    upset = stream(lambda update: update())
    monkeypatch.undo()
    assert count[0] > 20
    for one, other in zip(upset, calm, strict=True):
        assert torch.equal(one.weight, other.weight)
    assert torch.equal(upset[-1].covariance(), calm[-1].covariance())
    assert torch.equal(upset[-2].covariance(), calm[-2].covariance())


def at_instruction(n, act):
    """Run a function with a fault at the n-th instruction of `symmetric`'s bytecode; returns whether there
    was one.
    """
    seen = [0]

    def trace(frame, event, argument):
        if frame.f_code.co_filename != symmetric.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen[0] += 1
            if seen[0] == n:
                raise Fault
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except Fault:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_pass_may_break_off_at_any_instruction(monkeypatch):
    monkeypatch.setattr(symmetric, "_ROWS", 2)
    n = 0
    while True:
        n += 1
        C, G = PackedSymmetric.from_dense(torch.zeros(5, 5)), torch.arange(1.0, 6.0)[:, None]
        terms = [Term(G, 1.0), Term(2 * G, -1.0)]
        has_failed = at_instruction(n, lambda C=C, terms=terms: C.update_(terms))
        assert torch.equal(C.to_dense(terms), -3 * G @ G.T)
        C.update_(terms)
        assert torch.equal(C.to_dense(), -3 * G @ G.T)
        if not has_failed:
            break
    assert n > 300


def test_products_do_not_depend_on_what_was_brought_in():
    """Larger than two panels, so that products from both sides come in."""
    g = torch.Generator().manual_seed(0)
    K, V, W_0 = (
        torch.randn(60, 1100, generator=g),
        torch.randn(60, 3, generator=g),
        torch.randn(1100, 3, generator=g),
    )
    state = other = RecursiveLeastSquares(Prior(W_0, None, lambda_reg=3.0, mu_reg=1.0))
    other = copy.deepcopy(other)
    for start in (0, 20, 40):
        state = state.update(K[start : start + 20], V[start : start + 20])
        other = other.update(K[start : start + 20], V[start : start + 20])
        parts = other._parts
        parts.C.update_((*parts.settled, *parts.previous, *parts.last))
    assert torch.equal(state.weight, other.weight)
    C = state.covariance()
    assert torch.equal(C, other.covariance())
    assert torch.equal(C, C.T)
    exact = torch.linalg.inv(9.0 * torch.eye(1100, dtype=torch.float64) + K.double().T @ K.double())
    assert_close(C, exact, FLOAT32)


@settings(deadline=None, max_examples=60)
@given(problem=problems, data=st.data())
def test_a_stored_state_goes_on_bit_for_bit(problem, data):
    n = len(problem.K)
    cut = data.draw(st.integers(1, n - 1))
    before = problem.state(torch.float32)
    for start in range(0, cut, 3):
        before = problem.feed(before, start, min(start + 3, cut))
    now = problem.feed(before, cut, n)
    if data.draw(st.booleans(), label="joined"):
        now = problem.feed(now, 0, 1, same_change=True)
    stored = {name: tensor.clone() for name, tensor in now.tensors(before).items()}
    pairs = zip(RecursiveLeastSquares.from_tensors(stored, "layer 0"), (now, before), strict=True)
    alone, none = RecursiveLeastSquares.from_tensors(
        {name: t.clone() for name, t in now.tensors().items()}, "layer 0"
    )
    assert none is None
    for other, one in [*pairs, (alone, now)]:
        assert torch.equal(other.covariance(), one.covariance())
        assert (other.n_edits, other.weight_error()) == (one.n_edits, one.weight_error())
        assert other.drift() == pytest.approx(
            one.drift(), abs=DRIFT_TOLERANCE / 100
        )  # itself a rounding error
        other, one = problem.feed(other, 0, 2), problem.feed(one, 0, 2)
        assert torch.equal(other.weight, one.weight)
        assert torch.equal(other.covariance(), one.covariance())
