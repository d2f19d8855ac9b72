"""One layer's streams, any of them, and their batch solutions in float64."""

import torch
from hypothesis import strategies as st

from easyedit_rls.solvers.prior import Prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares


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
