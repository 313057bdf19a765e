"""The inverse of a matrix that has been factored: (U Uᵀ)⁻¹ from U, in place and in one triangle.

X = U⁻¹ a band of columns after the other, then XᵀX from the last band of rows up: n³ · 2/3 FLOP, and below the diagonal
nothing is touched, so that the H that `factor_` leaves there can be factored again.

On a GPU the triangle is halved again and again, so that nearly all of the work is products of large rectangles, by the
kernels of factor, Hessian and cross product: fp32 by three products of TF32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rac_kernels.backends import native
from rac_kernels.backends.dispatch import choose
from rac_kernels.ops.cross import cross_accumulate_
from rac_kernels.ops.hessian import ALIGNED, hessian_accumulate_
from rac_kernels.ops.product import COLUMNS, PART_DEPTH, PROGRAMS, ROWS, product

SIDE = 512  # of a triangle that is not halved any more, and columns of a product made at a time, on a GPU


def inverse_(U: Tensor, backend: str = "auto") -> None:
    """The upper triangle of U becomes that of (U Uᵀ)⁻¹, in place; below the diagonal nothing is read or written.

    U: [n, n] fp32 with contiguous rows, upper triangular, without zeros on its diagonal. ``backend`` as in
    `rac_kernels.backends.choose`. Raises ValueError if U is not
    such a matrix.
    """
    if U.ndim != 2 or U.shape[0] != U.shape[1] or U.dtype != torch.float32 or (len(U) > 1 and U.stride(1) != 1):
        raise ValueError(f"U must be a square fp32 matrix with contiguous rows, not {U.dtype} {list(U.shape)}")
    _inverse_op(U, choose(backend, U.device, triton=True))


@torch.library.custom_op("rac::inverse_", mutates_args=("U",))
def _inverse_op(U: Tensor, backend: str) -> None:
    if backend == "native":
        native.library().inverse(U.data_ptr(), len(U), U.stride(0), native.threads())
    elif backend == "triton":
        with torch.cuda.device_of(U):
            _invert_(U)
            _square_(U)
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


def _quarters(U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The upper triangle, the rectangle and the lower triangle that an upper triangle is made of."""
    half = -(-len(U) // (2 * COLUMNS)) * COLUMNS
    return U[:half, :half], U[:half, half:], U[half:, half:]


def _invert_(U: Tensor) -> None:
    """U becomes U⁻¹, in its upper triangle."""
    if len(U) > SIDE:
        A, B, D = _quarters(U)
        _invert_(A)
        _invert_(D)
        _multiply_(A, B)
        _multiply_right_(B, D)
        B.neg_()
    elif len(U):
        unit = torch.eye(len(U), dtype=U.dtype, device=U.device)
        own = torch.linalg.solve_triangular(U, unit, upper=True)
        U.copy_(own.triu_().add_(U.tril(-1)))


def _square_(X: Tensor) -> None:
    """An upper triangle X becomes that of XᵀX."""
    if len(X) > SIDE:
        A, B, D = _quarters(X)
        _square_(D)
        hessian_accumulate_(D, B, backend="triton")
        _multiply_transposed_(A, B)
        _square_(A)
    else:
        own = hessian_accumulate_(torch.zeros_like(X), X.triu(), backend="triton")
        X.copy_(own.add_(X.tril(-1)))


def _multiply_(A: Tensor, B: Tensor) -> None:
    """B becomes A B, A being an upper triangle."""
    if len(A) > SIDE:
        upper, beside, lower = _quarters(A)
        first, second = B.split([len(upper), len(lower)])
        _multiply_(upper, first)
        for columns, found in _products(beside, second):
            first[:, columns] += found
        _multiply_(lower, second)
    else:
        for columns, found in _products(A.triu(), B):
            B[:, columns] = found


def _multiply_right_(B: Tensor, D: Tensor) -> None:
    """B becomes B D, D being an upper triangle."""
    if len(D) > SIDE:
        upper, beside, lower = _quarters(D)
        first, second = B.split([len(upper), len(lower)], 1)
        _multiply_right_(second, lower)
        for columns, found in _products(first, beside):
            second[:, columns] += found
        _multiply_right_(first, upper)
    else:
        for columns, found in _products(B, D.triu()):  # all of them at once
            B[:, columns] = found


def _multiply_transposed_(A: Tensor, B: Tensor) -> None:
    """B becomes AᵀB, A being an upper triangle."""
    if len(A) > SIDE:
        upper, beside, lower = _quarters(A)
        first, second = B.split([len(upper), len(lower)])
        _multiply_transposed_(lower, second)
        cross_accumulate_(second, beside, first, backend="triton")
        _multiply_transposed_(upper, first)
    else:
        B.copy_(cross_accumulate_(torch.zeros_like(B), A.triu(), B, backend="triton"))


def _products(A: Tensor, B: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A B, SIDE of its columns after the other: where they are, and they."""
    for lo in range(0, B.shape[1], SIDE):
        some = B[:, lo : lo + SIDE]
        width = some.shape[1]
        within = width // COLUMNS * COLUMNS
        made = list[Tensor]()
        if within:
            blocks = some[:, :within].unflatten(1, (-1, COLUMNS)).transpose(0, 1)
            made.append(product(A.expand(len(blocks), *A.shape), blocks).sum(1).transpose(0, 1).flatten(1))
        if within < width:
            made.append(product(A[None], some[None, :, within:]).sum(1)[0, :, : width - within])
        yield slice(lo, lo + width), torch.cat(made, 1)


def workspace(n: int, device: torch.device) -> int:
    """Bytes that `inverse_` takes for a U [n, n] where no native code runs: a few bands of its columns."""
    if device.type != "cuda":
        return 12 * side_of(n) * n
    half = -(-n // (2 * COLUMNS)) * COLUMNS
    # The parts of SIDE columns of a product, and the sum twice; the rows that make fewer parts are the most.
    parts = max(half * -(-half // PART_DEPTH), ROWS * PROGRAMS + half)
    copy = 4 * half * half if n % ALIGNED else 0
    return 4 * SIDE * (parts + 2 * half + 2 * n + 4 * SIDE) + copy
