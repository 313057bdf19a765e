"""H + λI = U Uᵀ with U upper triangular, by one Cholesky factorization in place.

The SparseGPT factor R with (H + λI)⁻¹ = RᵀR is U⁻¹, and the sweep never needs it. An upper U with the factor on the
left is what a Cholesky run from the last column to the first gives: n³/3 FLOP where the usual chain (Cholesky, inverse,
Cholesky of the inverse) costs 4n³/3 and two more matrices.

Reference: Frantar, Alistarh, "SparseGPT" (arXiv 2301.00774), for damping and dead columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # columns factored at a time; the rest of the work is one product a block
MIRROR = 1024  # side of the squares copied from one triangle to the other
FIRST_STEP = 1e-6  # where escalation starts when no damping was asked for


class FactorError(RuntimeError):
    """H cannot be factored: it is not finite, not a Gram matrix, or not positive definite at any damping allowed."""


@dataclass(frozen=True)
class Factor:
    """H + λI = U Uᵀ.

    ``U`` [n, n] fp32 is H's own storage: its upper triangle, diagonal included, holds U; below the diagonal lies
    what stood above it in H, so H's memory serves both. ``diagonal`` [n] fp32 is H's diagonal as it came.
    """

    U: Tensor
    dead: Tensor
    """[n] bool: columns with H_ii = 0. They have U_ii = √(1 + λ) and no coupling."""
    damping: float
    """The damping that succeeded: λ is this times the mean of H_ii over columns that are not dead."""
    ridge: float
    """λ itself."""
    attempts: list[float]
    """Every damping tried, the last one being ``damping``."""
    diagonal: Tensor


def factor_(H: Tensor, damping: float = 0.01, max_damping: float = 1.0) -> Factor:
    """Factors H + λI = U Uᵀ in place, λ = damping · mean(H_ii over live columns).

    H: [n, n] fp32, contiguous rows; only its upper triangle is read. Dead columns (H_ii = 0) get a unit diagonal and
    do not enter the mean; without dead columns λ is that of the published SparseGPT, which counts each dead column
    as 1 and so depends on H's scale. If H + λI is not positive definite in fp32, the damping is raised tenfold (from
    0: to 1e-6) until it exceeds ``max_damping``; every value tried is recorded. The result does not depend on H's
    scale as long as H_ii stays within about 1e-30 to 1e30: a Cholesky factorization commutes with scaling the
    diagonal, so large ranges inside one H need no care either.

    Raises FactorError if H is not finite, has a negative diagonal element or a coupling to a dead column (no XᵀX
    has), or if no damping up to the limit makes it positive definite. H's contents are lost then.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.dtype != torch.float32 or H.stride(-1) != 1:
        raise ValueError(f"H must be a square fp32 matrix with contiguous rows, not {H.dtype} {tuple(H.shape)}")
    if not (damping >= 0 and max_damping >= damping):
        raise ValueError(f"damping {damping} must lie between 0 and max_damping {max_damping}")
    diagonal = H.diagonal().clone()
    dead = diagonal == 0
    _check(H, diagonal, dead)
    live = diagonal[~dead].double()
    mean = float(live.mean()) if live.numel() else 0.0
    _mirror_(H)

    attempts: list[float] = []
    while True:
        attempts.append(damping)
        ridge = damping * mean
        H.diagonal().copy_(torch.where(dead, 1.0, diagonal) + ridge)
        if _cholesky_(H):
            return Factor(H, dead, damping, ridge, attempts, diagonal)
        damping = max(damping * 10, FIRST_STEP)
        if damping > max_damping:
            tried = ", ".join(f"{value:g}" for value in attempts)
            raise FactorError(f"H [{H.shape[0]}] is not positive definite with damping {tried} (limit {max_damping:g})")
        _mirror_(H.T)


def _check(H: Tensor, diagonal: Tensor, dead: Tensor) -> None:
    """Refuses what no sum of x xᵀ can be."""
    n = H.shape[0]
    for lo in range(0, n, MIRROR):
        rows = H[lo : lo + MIRROR, lo:]
        bounds = torch.stack(torch.aminmax(rows)) if lo + MIRROR < n else rows.triu()
        if not bounds.isfinite().all() and not rows.triu().isfinite().all():
            raise FactorError(f"H [{n}] holds infinities or NaN")
    if (diagonal < 0).any():
        raise FactorError(f"H [{n}] is no Gram matrix: diagonal element {int((diagonal < 0).nonzero()[0])} is negative")
    for i in dead.nonzero().flatten().tolist():
        if H[:i, i].any() or H[i, i + 1 :].any():
            raise FactorError(f"H [{n}] is no Gram matrix: column {i} has a zero diagonal but is not zero")


def _mirror_(H: Tensor) -> None:
    """Copies the strictly upper triangle onto the lower one, square by square."""
    n = H.shape[0]
    for lo in range(0, n, MIRROR):
        hi = min(lo + MIRROR, n)
        corner = H[lo:hi, lo:hi]
        corner.copy_(corner.triu() + corner.triu(1).T)
        H[hi:, lo:hi] = H[lo:hi, hi:].T


def _cholesky_(H: Tensor) -> bool:
    """Upper triangle of H → U with H = U Uᵀ, from the last block of columns to the first. False: not positive definite.

    Left-looking: a block of columns is final once the product of all columns to its right is taken off.
    """
    hi = H.shape[0]
    while hi:
        lo = (hi - 1) // BLOCK * BLOCK
        H[:hi, lo:hi].addmm_(H[:hi, hi:], H[lo:hi, hi:].T, alpha=-1)
        corner = H[lo:hi, lo:hi]
        L, info = torch.linalg.cholesky_ex(corner.triu().T.flip(0, 1))
        ...
        hi = lo
    return True
