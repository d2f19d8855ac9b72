"""Symmetric matrices held by half, against dense ones. 1,100 rows are three panels, the last one ragged."""

import pytest
import torch

from easyedit_rls.solvers.packed import PackedSymmetric, Term
from tests.tolerances import FLOAT64

SIZES = [1, 63, 64, 65, 200, 512, 1100]


def symmetric(n: int) -> torch.Tensor:
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return M + M.T


@pytest.mark.parametrize("n", SIZES)
def test_a_matrix_comes_back_whole(n):
    M = symmetric(n)
    packed = PackedSymmetric.from_dense(M)
    assert len(packed) == n
    assert torch.equal(packed.to_dense(), M)
    assert sum(panel.numel() for panel in packed.panels) <= n * (n + 512) / 2 + 512 * 512
    packed.panels[0].zero_()  # it owns its memory
    assert M.any()


def test_dtype_and_layout_do_not_matter():
    M = symmetric(600)
    one, other = PackedSymmetric.from_dense(M.float()), PackedSymmetric.from_dense(M.T, torch.float32)
    assert all(panel.dtype == torch.float32 and panel.is_contiguous() for panel in other.panels)
    assert torch.equal(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("n", SIZES)
def test_an_update_equals_the_dense_one(n):
    g = torch.Generator().manual_seed(0)
    M = symmetric(n)
    G, H, X = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((n, 3), (n, 2), (4, n)))
    packed = PackedSymmetric.from_dense(M)
    product = packed.update_([Term(G, -1.0), Term(H, 1.0)], X)
    expected = M - G @ G.T + H @ H.T
    torch.testing.assert_close(packed.to_dense(), expected, rtol=0, atol=FLOAT64 * n)
    torch.testing.assert_close(product, X @ expected, rtol=0, atol=FLOAT64 * n)
    assert torch.equal(packed.to_dense(), packed.to_dense().T)


def test_without_anything_to_multiply_only_the_matrix_changes():
    packed, G = PackedSymmetric.from_dense(symmetric(600)), torch.ones(600, 1, dtype=torch.float64)
    twin = packed.clone()
    assert packed.update_([Term(G, 1.0)]).shape == (0, 600)
    assert torch.equal(packed.to_dense(), symmetric(600) + 1)
    assert torch.equal(twin.to_dense(), symmetric(600))


@pytest.mark.parametrize("n", SIZES)
def test_packing_keeps_every_bit_in_about_half(n):
    M = symmetric(n)
    vector = PackedSymmetric.from_dense(M).to_vector()
    assert vector.numel() <= n * (n + 64) / 2 + 64 * 64
    back = PackedSymmetric.from_vector(vector, n)
    assert torch.equal(back.to_dense(), M)
    assert all(
        torch.equal(a, b) for a, b in zip(back.panels, PackedSymmetric.from_dense(M).panels, strict=True)
    )


def test_the_vector_is_the_same_however_the_rows_are_cut(monkeypatch):
    vector = PackedSymmetric.from_dense(symmetric(300)).to_vector()
    monkeypatch.setattr("easyedit_rls.solvers.packed._ROWS", 128)
    packed = PackedSymmetric.from_dense(symmetric(300))
    assert len(packed.panels) == 3
    assert torch.equal(packed.to_vector(), vector)
    assert torch.equal(PackedSymmetric.from_vector(vector, 300).to_dense(), symmetric(300))
