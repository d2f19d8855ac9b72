"""Pure linear algebra on symmetric positive definite (SPD) matrices.

Letters as in RLSEdit (arXiv 2601.15686): ``A`` the information matrix, ``C = A^-1`` the covariance, ``K``
keys with one edit a row, ``D`` importances. Nothing here knows of models or files.
"""

import torch
from torch import Tensor

from easyedit_rls.errors import NumericalError

_BLOCK = 512  # rows of a block that is turned in one piece; two float32 blocks are 2 MB
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
        NumericalError: A holds NaN or infinity, or is not positive definite. Nothing is added to the diagonal
            in silence.

    >>> A = torch.tensor([[4.0, 2.0, 2.0], [2.0, 5.0, 3.0], [2.0, 3.0, 6.0]])
    >>> cholesky(A)
    tensor([[2., 0., 0.],
            [1., 2., 0.],
            [1., 1., 2.]])
    """
    if not bool(torch.isfinite(A).all()):
        raise NumericalError(
            f"{name} holds NaN or infinite entries. Check the model's weights and the inputs for NaN."
        )
    L: Tensor
    L, info = torch.linalg.cholesky_ex(A)
    if int(info.item()) != 0:
        raise NumericalError(
            f"{name} is not positive definite (leading minor {int(info.item())} of {A.shape[0]}, {A.dtype}). "
            f"{cure}"
        )
    return L


def inverse_factor(A: Tensor, name: str = "Matrix") -> Tensor:
    """R with ``R Rᵀ = A^-1``, (n, n), upper triangular, so that ``a A^-1 aᵀ = ‖a R‖²`` loses no digits.

    Args:
        A: SPD matrix, (n, n), float32 or float64.
        name: what the matrix is, for the error's text.

    Raises:
        NumericalError: see `cholesky`.

    >>> R = inverse_factor(torch.tensor([[4.0, 2.0], [2.0, 5.0]]))
    >>> R @ R.T @ torch.tensor([[4.0, 2.0], [2.0, 5.0]])
    tensor([[1., 0.],
            [0., 1.]])
    """
    eye = torch.eye(len(A), dtype=A.dtype, device=A.device)
    factor: Tensor = torch.linalg.solve_triangular(cholesky(A, name), eye, upper=False).T.contiguous()
    return factor


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
    n, size = M.shape[0], _BLOCK if M.device.type == "cpu" else _DEVICE_BLOCK
    for i in range(0, n, size):
        for j in range(0, i + 1, size):
            lower = M[i : i + size, j : j + size]
            upper = M[j : j + size, i : i + size]
            mean = (lower + upper.T).mul_(0.5)
            lower.copy_(mean)
            upper.copy_(mean.T)
    return M


def row_major(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy in another tensor's dtype and device, laid out row by row: products come out bit for bit
    whatever the layout was.

    >>> row_major(torch.ones(2, 1).T, torch.ones(1)).stride()
    (2, 1)
    """
    return tensor.to(like).clone(memory_format=torch.contiguous_format)


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
    return cholesky(
        S,
        "Innovation matrix S",
        "The covariance has lost positive definiteness: start a new editor, or raise lambda_reg.",
    )


def information_drift(
    CY: Tensor,  # shape: (d_k, p)
    Z: Tensor,  # shape: (d_k, p)
) -> float:
    """How far ``C`` is from the inverse of ``A``, seen through p probes: ``‖C (A Z) − Z‖ / ‖Z‖`` (Frobenius
    norms).

    Args:
        CY: ``C Y`` with ``Y = A Z`` carried along separately.
        Z: the probes.

    Returns:
        The relative error; 0 for an exact inverse.

    >>> information_drift(torch.ones(3, 2), torch.ones(3, 2))
    0.0
    """
    return float((CY - Z).norm() / Z.norm())
