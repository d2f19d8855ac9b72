"""Edits of any weight, taken out again: in float32 while it can, in float64 where it can't; judged by float64
batch solutions.
"""

import random

import pytest
import torch

from easyedit_rls.data.requests import EditRequest
from easyedit_rls.ledger import Place
from easyedit_rls.ledger.change import Change
from easyedit_rls.ledger.history import Edit
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.solvers.batch import Beginning
from easyedit_rls.solvers.forgetting import ForgettingLeastSquares, ForgettingSettings
from easyedit_rls.solvers.packed import PackedSymmetric
from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.tolerances import FLOAT32, LONG_STREAM_FLOAT32, OTHERS, TAKEN_OUT

D_K, D_V, LAMBDA = 64, 16, 0.5


class Stream:
    """One layer's stream of edits, as the editor makes it, with the float64 batch solution beside it."""

    def __init__(self, seed=0, forgets=False):
        g = self.g = torch.Generator().manual_seed(seed)
        self.spectrum = torch.logspace(0, -1, D_K)  # keys of real text are far from isotropic
        text = torch.randn(400, D_K, generator=g) * self.spectrum
        gram, W_0 = 10 * text.T @ text / len(text), 0.05 * torch.randn(D_K, D_V, generator=g)
        how = {"lambda_reg": LAMBDA, "mu_reg": 1.0, "name": "layer 0"}
        solution = (
            ForgettingLeastSquares(Prior(W_0, gram, **how), ForgettingSettings(1.0))
            if forgets
            else RecursiveLeastSquares(Prior(W_0, gram, **how))
        )
        beginning = Beginning(PackedSymmetric.from_dense(gram), None, LAMBDA, 1.0, W_0, solution.watch)
        self.now = Moment({0: solution}, {0: W_0}, {0: beginning})
        self.A_0 = LAMBDA**2 * torch.eye(D_K, dtype=torch.float64) + gram.double()
        self.W_0, self.edits, self.rebuilds = W_0.double(), {}, 0

    def draw(self, n=1):
        return torch.randn(n, D_K, generator=self.g) * self.spectrum, 0.3 * torch.randn(
            n, D_V, generator=self.g
        )

    def weigh(self, key):
        """How much an edit of importance 1 weighs: r = k C_0 kᵀ."""
        return float(key.double() @ torch.linalg.solve(self.A_0, key.double().T))

    def change(self, kind, removed=(), edits=None):
        change = Change(self.now, kind)
        change.open(removed)
        if edits is not None:
            K, V, D = edits
            change.bring_in(0, K, V, D)
            first = self.now.history.next_id
            change.edits = tuple(
                Edit(first + i, EditRequest("", f"{first + i}", "", "x"), i) for i in range(len(K))
            )
            self.edits |= {first + i: (K[i].double(), V[i].double(), D[i].double()) for i in range(len(K))}
        for number in removed:
            del self.edits[number]
        entry = change.entry("")
        object.__setattr__(entry, "data", lambda: change.data)
        self.rebuilds += bool(change.rebuilt)
        self.now = self.now.changed(change.solutions, change.shards, self.now.history.plus(entry), Place())

    def edit(self, K, V, importance):
        self.change("edit", edits=(K, V, torch.as_tensor(importance).expand(len(K)).float()))

    @property
    def weight(self):
        return self.now.solutions[0].weight.double()

    def exact(self, without=()):
        kept = [edit for number, edit in self.edits.items() if number not in without]
        A, B = self.A_0.clone(), self.A_0 @ self.W_0
        for key, value, d in kept:
            A += d * key[:, None] * key
            B += d * key[:, None] * value
        return torch.linalg.solve(A, B)

    def error(self):
        exact = self.exact()
        return float((self.weight - exact).norm() / (exact - self.W_0).norm())


@pytest.mark.parametrize("forgets", [False, True])
@pytest.mark.parametrize("r", [1e-2, 1e-1, 1.0, 10.0, 30.0, 150.0, 1500.0, 1.5e4, 1e6, 1e8])
def test_an_edit_of_any_weight_is_taken_back_exactly(r, forgets):
    for seed in range(3):
        stream = Stream(seed, forgets)
        for _ in range(6):
            K, V = stream.draw(5)
            stream.edit(K, V, 1.0)
        K, V = stream.draw()
        stream.edit(K, V, r / stream.weigh(K))
        for _ in range(2):
            K, V = stream.draw(5)
            stream.edit(K, V, 1.0)
        edited, without = stream.exact(), stream.exact(without=[31])
        size, before = float((edited - without).norm()), stream.weight
        stream.change("retract", [31])
        taken_out = (before - stream.weight) - (edited - without)
        assert float(taken_out.norm()) / size < TAKEN_OUT
        whole = float((edited - stream.W_0).norm())
        assert float((stream.weight - without).norm()) < TAKEN_OUT * size + OTHERS * whole
        assert stream.now.solutions[0].n_edits == 40


def test_a_thousand_edits_of_all_importances_half_of_them_taken_back():
    stream, chance = Stream(), random.Random(0)
    for _ in range(200):
        K, V = stream.draw(5)
        importances = torch.tensor([10 ** chance.uniform(-6, 6) for _ in range(5)])
        stream.change("edit", edits=(K, V, importances))
    assert stream.error() < LONG_STREAM_FLOAT32
    gone = list(range(1, 1001))
    chance.shuffle(gone)
    for at in range(0, 500, 4):
        stream.change("retract", sorted(gone[at : at + 4]))
        if at % 100 == 0:
            assert stream.error() < LONG_STREAM_FLOAT32
    assert stream.error() < LONG_STREAM_FLOAT32
    C = stream.now.solutions[0].covariance()
    assert torch.equal(C, C.T)
    assert int(torch.linalg.cholesky_ex(C.double()).info) == 0
    assert stream.now.solutions[0].n_edits == 500


def test_one_key_two_thousand_five_hundred_times():
    stream = Stream()
    key, _ = stream.draw()
    errors = []
    for i in range(2500):
        _, V = stream.draw()
        stream.edit(key, V, 1.0)
        if i % 250 == 249:
            errors.append(stream.error())
    assert max(errors) < LONG_STREAM_FLOAT32


@pytest.mark.parametrize("importances", [(1.0, 1.0), (1e-6, 1e6)])
def test_the_same_key_twice_in_a_batch(importances):
    stream = Stream()
    K, V = stream.draw()
    stream.change("edit", edits=(K.repeat(2, 1), torch.cat([V, -V]), torch.tensor(importances)))
    assert stream.error() < FLOAT32
    stream.change("retract", [2])
    assert stream.error() < LONG_STREAM_FLOAT32
