"""The recursion against the float64 batch solution: any split, any regularizers, importances, anchors; and
its memory.
"""

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
from tests.tolerances import FEW_EDITS_DRIFT, FLOAT32, FLOAT64, LONG_STREAM_FLOAT32, RETRACTION, RETRACTIONS


class Problem:
    """One layer's whole stream, and the batch solution by a dense float64 solve."""

    def __init__(self, seed, n_edits, regularizers, has_importance, anchors, d_k=12, d_v=5):
        g = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.lam, self.mu = {"lambda": (0.7, 0.0), "mu": (0.0, 1.3), "both": (0.4, 0.9)}[regularizers]
        self.W_0, self.K, self.V = randn(d_k, d_v), randn(n_edits, d_k), randn(n_edits, d_v)
        self.d = (
            torch.rand(n_edits, generator=g, dtype=torch.float64) * 3 + 0.1
            if has_importance
            else torch.ones(n_edits, dtype=torch.float64)
        )
        K_0 = randn(4 * d_k, d_k)
        self.gram, self.cross = K_0.T @ K_0, None
        V_0 = K_0 @ self.W_0
        if anchors == "pairs":
            V_0 = randn(4 * d_k, d_v)
            self.cross = K_0.T @ V_0
        self.anchor_right = K_0.T @ V_0

    def state(self, dtype=torch.float64):
        cross = None if self.cross is None else self.cross.to(dtype)
        return RecursiveLeastSquares(
            Prior(
                self.W_0.to(dtype),
                self.gram.to(dtype),
                lambda_reg=self.lam,
                mu_reg=self.mu,
                anchor_cross=cross,
                name="layer 0",
            )
        )

    def feed(self, state, start, end, **how):
        return state.update(self.K[start:end], self.V[start:end], self.d[start:end], **how)

    def information(self, rows):
        K, d = self.K[rows], self.d[rows]
        return (
            self.lam**2 * torch.eye(K.shape[1], dtype=torch.float64)
            + self.mu**2 * self.gram
            + K.T @ (d[:, None] * K)
        )

    def solution(self, rows=slice(None)):
        right = (
            self.lam**2 * self.W_0
            + self.mu**2 * self.anchor_right
            + self.K[rows].T @ (self.d[rows, None] * self.V[rows])
        )
        return torch.linalg.solve(self.information(rows), right)


problems = st.builds(
    Problem,
    seed=st.integers(0, 10_000),
    n_edits=st.integers(2, 40),
    regularizers=st.sampled_from(["lambda", "mu", "both"]),
    has_importance=st.booleans(),
    anchors=st.sampled_from(["moments", "pairs"]),
)


def splits(data, n):
    cuts = sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=n - 1), label="cuts"))
    return list(zip([0, *cuts], [*cuts, n]))


def assert_close(actual, expected, tolerance):
    assert float((actual.double() - expected).norm() / expected.norm()) < tolerance


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


def test_singular_prior_names_layer_and_cure():
    keys = torch.ones(3, 6)
    with pytest.raises(NumericalError, match=r"Prior of layer 5 \(d_k=6, lambda_reg=0.*Raise lambda_reg"):
        RecursiveLeastSquares(
            Prior(torch.ones(6, 2), keys.T @ keys, lambda_reg=0.0, mu_reg=1.0, name="layer 5")
        )


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
