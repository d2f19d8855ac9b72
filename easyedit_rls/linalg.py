"""Pure linear algebra on symmetric positive definite (SPD) matrices.

Letters as in RLSEdit (arXiv 2601.15686): ``A`` the information matrix, ``C = A^-1`` the covariance, ``K`` keys with one edit
a row, ``D`` importances. Nothing here knows of models or files.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError

_STRIP = 64  # rows of a strip in `pack_symmetric`
_BLOCK = 512  # rows of a block: measured best of 256 to 2048 at n = 14,336; two float32 blocks are 2 MB
_DEVICE_BLOCK = 4096  # the same on an accelerator, where each block costs launches


def cholesky(
    A: Tensor,  # shape: (n, n), SPD
    name: str = "Matrix",
    cure: str = "Raise lambda_reg or collect more text.",
) -> Tensor:
    """Lower Cholesky factor L of an SPD matrix, ``A = L Lᵀ``.

    Args:
        A: SPD matrix, (n, n), float32 or float64. Only the lower triangle is read.
        name: what the matrix is, for the error's text.
        cure: what the user can do, for the error's text.

    Returns:
        L, (n, n), lower triangular, same dtype and device.

    Raises:
        NumericalError: A holds NaN or infinity, or is not positive definite. Nothing is added to the diagonal in silence.

    >>> A = torch.tensor([[4.0, 2.0, 2.0], [2.0, 5.0, 3.0], [2.0, 3.0, 6.0]])
    >>> cholesky(A)
    tensor([[2., 0., 0.],
            [1., 2., 0.],
            [1., 1., 2.]])
    """
    if not bool(torch.isfinite(A).all()):
        raise NumericalError(f"{name} holds NaN or infinite entries. Check the model's weights and the inputs for NaN.")
    L: Tensor
    L, info = torch.linalg.cholesky_ex(A)
    if int(info.item()) != 0:
        raise NumericalError(f"{name} is not positive definite (leading minor {int(info.item())} of {A.shape[0]}, {A.dtype}). {cure}")
    return L


def spd_inverse(
    A: Tensor,  # shape: (n, n), SPD
    name: str = "Matrix",
    cure: str = "Raise lambda_reg or collect more text.",
) -> Tensor:
    """Inverse of an SPD matrix through its Cholesky factor; exactly symmetric.

    Used once a layer, for the prior covariance ``C_0 = A_0^-1``.

    Args:
        A: SPD matrix, (n, n), float32 or float64.
        name: what the matrix is, for the error's text.
        cure: what the user can do, for the error's text.

    Returns:
        The inverse, (n, n), same dtype and device.

    Raises:
        NumericalError: see `cholesky`.

    >>> spd_inverse(torch.diag(torch.tensor([1.0, 4.0, 16.0]))).diagonal()
    tensor([1.0000, 0.2500, 0.0625])
    """
    inverse = torch.cholesky_inverse(cholesky(A, name, cure))
    symmetrize_(inverse)
    return inverse


def symmetrize_(M: Tensor) -> Tensor:  # shape: (n, n)
    """Replace M by ``(M + Mᵀ)/2`` in place, block by block: no temporary of M's size.

    Args:
        M: square matrix, (n, n), any float dtype; changed in place.

    Returns:
        M itself.

    >>> symmetrize_(torch.tensor([[1.0, 2.0, 0.0], [4.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    tensor([[1., 3., 0.],
            [3., 1., 0.],
            [0., 0., 1.]])
    """
    n = M.shape[0]
    for i in range(0, n, _BLOCK):
        for j in range(0, i + 1, _BLOCK):
            lower = M[i : i + _BLOCK, j : j + _BLOCK]
            upper = M[j : j + _BLOCK, i : i + _BLOCK]
            mean = (lower + upper.T).mul_(0.5)
            lower.copy_(mean)
            upper.copy_(mean.T)
    return M


def rank_update_(
    C: Tensor,  # shape: (n, n), symmetric
    terms: Sequence[tuple[Tensor, float]],  # shape of each: (n, u)
    X: Tensor,  # shape: (n, m), m may be 0
) -> Tensor:
    """``C ← C + Σ sign · G Gᵀ`` in place, and ``C X`` with the new C, in one pass over one triangle of C.

    Block by block: each block below the diagonal is read once, changed, mirrored, and multiplied while it is in the cache. No
    temporary is larger than a block, C stays exactly symmetric, and the product depends on C's entries alone, whether a change
    is folded in at the same time or was before.

    Args:
        C: symmetric; changed in place.
        terms: pairs (G, sign), sign 1 or -1.
        X: what to multiply with; no columns cost nothing.

    Returns:
        ``C X`` for the new C, (n, m).

    >>> C = torch.eye(2)
    >>> rank_update_(C, [(torch.tensor([[1.0], [2.0]]), -1.0)], torch.tensor([[1.0], [1.0]]))
    tensor([[-2.],
            [-5.]])
    >>> C
    tensor([[ 0., -2.],
            [-2., -3.]])
    """
    is_cpu = C.device.type == "cpu"
    size = _BLOCK if is_cpu else _DEVICE_BLOCK
    out = torch.zeros(len(C), X.shape[1], dtype=C.dtype, device=C.device)
    for i in range(0, len(C), size):
        rows = slice(i, i + size)
        for j in range(0, i + 1, size):
            columns = slice(j, j + size)
            block = C[rows, columns]
            for G, sign in terms:
                block.addmm_(G[rows], G[columns].T, alpha=sign)
            if terms and i == j:
                symmetrize_(block)
            elif terms:
                near = block.contiguous() if is_cpu else block  # a CPU takes twice as long to turn what lies far apart in C
                C[columns, rows].copy_(near.T)
            if X.shape[1]:
                out[rows].addmm_(block, X[columns])
                if i != j:
                    out[columns].addmm_(block.T, X[rows])
    return out


def row_major(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy in another tensor's dtype and device, laid out row by row: products come out bit for bit whatever the layout was.

    >>> row_major(torch.ones(2, 1).T, torch.ones(1)).stride()
    (2, 1)
    """
    return tensor.to(like).clone(memory_format=torch.contiguous_format)


def pack_symmetric(C: Tensor) -> Tensor:  # shape: (n, n), symmetric
    """About half of a symmetric matrix: its lower triangle, in strips of 64 rows cut off behind the diagonal block.

    Args:
        C: exactly symmetric, (n, n).

    Returns:
        A new vector of n(n + 64)/2 entries at most, from which `unpack_symmetric` makes C again, bit for bit.

    >>> pack_symmetric(torch.eye(2))
    tensor([1., 0., 0., 1.])
    """
    n = len(C)
    return torch.cat([C[i : i + _STRIP, : i + _STRIP].reshape(-1) for i in range(0, n, _STRIP)])


def unpack_symmetric(packed: Tensor, n: int) -> Tensor:
    """The (n, n) matrix that `pack_symmetric` was given.

    >>> unpack_symmetric(torch.tensor([1.0, 2.0, 2.0, 5.0]), 2)
    tensor([[1., 2.],
            [2., 5.]])
    """
    C = torch.empty(n, n, dtype=packed.dtype, device=packed.device)
    start = 0
    for i in range(0, n, _STRIP):
        rows, columns = min(_STRIP, n - i), min(i + _STRIP, n)
        strip = packed[start : start + rows * columns].reshape(rows, columns)
        C[i : i + rows, :columns] = strip
        C[:i, i : i + rows] = strip[:, :i].T
        start += rows * columns
    return C


def innovation_factor(
    K: Tensor,  # shape: (u, d_k)
    F: Tensor,  # shape: (d_k, u), F = C Kᵀ
    importance: Tensor,  # shape: (u,), positive
) -> Tensor:
    """Lower Cholesky factor of the innovation matrix ``S = D^-1 + K C Kᵀ`` (Woodbury's u × u core).

    Args:
        K: keys, one edit a row.
        F: ``C Kᵀ``.
        importance: diagonal of D.

    Returns:
        L with ``S = L Lᵀ``, (u, u).

    Raises:
        NumericalError: S is not positive definite, which means that C no longer is.

    >>> innovation_factor(torch.eye(3), torch.eye(3) * 3, torch.ones(3)).diagonal()
    tensor([2., 2., 2.])
    """
    S = K @ F
    symmetrize_(S)
    S.diagonal().add_(importance.reciprocal())
    return cholesky(S, "Innovation matrix S", "The covariance has lost positive definiteness: start a new editor, or raise lambda_reg.")


def information_drift(
    CY: Tensor,  # shape: (d_k, p)
    Z: Tensor,  # shape: (d_k, p)
) -> float:
    """How far ``C`` is from the inverse of ``A``, seen through p probes: ``‖C (A Z) − Z‖ / ‖Z‖`` (Frobenius norms).

    Args:
        CY: ``C Y`` with ``Y = A Z`` carried along separately.
        Z: the probes.

    Returns:
        The relative error; 0 for an exact inverse.

    >>> information_drift(torch.ones(3, 2), torch.ones(3, 2))
    0.0
    """
    return float((CY - Z).norm() / Z.norm())
