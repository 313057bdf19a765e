"""The inverse of a matrix that has been factored: (U Uᵀ)⁻¹ from U, in place and in one triangle.

X = U⁻¹ a band of columns after the other, then XᵀX from the last band of rows up: n³ · 2/3 FLOP, and below the diagonal
nothing is touched, so that the H that `factor_` leaves there can be factored again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels.backends import native
from rac_kernels.backends.dispatch import choose


def inverse_(U: Tensor, backend: str = "auto") -> None:
    """The upper triangle of U becomes that of (U Uᵀ)⁻¹, in place; below the diagonal nothing is read or written.

    U: [n, n] fp32 with contiguous rows, upper triangular, without zeros on its diagonal. ``backend`` as in
    `rac_kernels.backends.choose`; on a GPU the reference runs, whose products are large. Raises ValueError if U is not
    such a matrix.
    """
    if U.ndim != 2 or U.shape[0] != U.shape[1] or U.dtype != torch.float32 or (len(U) > 1 and U.stride(1) != 1):
        raise ValueError(f"U must be a square fp32 matrix with contiguous rows, not {U.dtype} {list(U.shape)}")
    _inverse_op(U, choose(backend, U.device))


@torch.library.custom_op("rac::inverse_", mutates_args=("U",))
def _inverse_op(U: Tensor, backend: str) -> None:
    if backend == "native":
        native.library().inverse(U.data_ptr(), len(U), U.stride(0), native.threads())
    else:
        _inverse_reference_(U)


@_inverse_op.register_fake
def _(U: Tensor, backend: str) -> None:
    return None


def side_of(n: int) -> int:
    """Rows or columns that the reference inverts at a time: more waste products, fewer make small ones."""
    return min(n, max(96, min(n // 16, 512)))


def _inverse_reference_(U: Tensor) -> None:
    n, side = len(U), side_of(len(U))
    bands = [slice(lo, min(lo + side, n)) for lo in range(0, n, max(side, 1))]
    for here in bands:
        corner = U[here, here]
        unit = torch.eye(len(corner), dtype=U.dtype, device=U.device)
        own = torch.linalg.solve_triangular(corner, unit, upper=True)
        for rows in bands[: here.start // side]:
            found = U[rows, rows].triu() @ U[rows, here]
            found.addmm_(U[rows, rows.stop : here.start], U[rows.stop : here.start, here])
            torch.mm(found, own, out=U[rows, here]).neg_()
        corner.copy_(own.triu_().add_(corner.tril(-1)))
    for here in reversed(bands):
        corner, beyond = U[here, here], U[here, here.stop :]
        own = corner.triu()
        beyond.copy_((own.T @ beyond).addmm_(U[: here.start, here].T, U[: here.start, here.stop :]))
        own = (own.T @ own).addmm_(U[: here.start, here].T, U[: here.start, here])
        corner.copy_(own.triu_().add_(corner.tril(-1)))


def workspace(n: int) -> int:
    """Bytes that the reference takes for a U [n, n]: a few bands of its columns."""
    return 12 * side_of(n) * n
