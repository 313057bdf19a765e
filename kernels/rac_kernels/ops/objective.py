"""The layer objective: how far a pruned matrix moves its outputs on the calibration tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rac_kernels.ops.hessian import hessian_accumulate_

ROWS_BYTES = 128 << 20  # bytes of rows held in fp64 at a time

COLUMNS = 192

GRAM_COLUMNS = 2048  # up to which `squared_outputs` makes the Gram matrix of the weights

CANCELLED = (
    100.0  # times less than without correlations, at most, that `reported_objective` may find by products in fp32
)


def objective(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """‖X Wᵀ − X Qᵀ‖² = tr((W − Q) H (W − Q)ᵀ) with H = XᵀX, in fp64 throughout.

    W, Q: [rows, n], any float dtype. H: [n, n], of which only the upper triangle is read. Chunks of rows and columns
    are widened as they are used, so nothing of H's size is allocated. Costs rows·n² FLOP, half of the full product.
    """
    return float(row_objectives(W, Q, H).sum())


def row_objectives(W: Tensor, Q: Tensor, H: Tensor) -> Tensor:
    """Each row's part of `objective`: [rows] fp64 on W's device."""
    rows, n = W.shape
    if Q.shape != W.shape or H.shape != (n, n):
        raise ValueError(f"shapes do not fit: W {tuple(W.shape)}, Q {tuple(Q.shape)}, H {tuple(H.shape)}")
    totals = torch.zeros(rows, dtype=torch.float64, device=W.device)
    step = _rows(n)
    for top in range(0, rows, step):
        D = W[top : top + step].double() - Q[top : top + step].double()
        for lo in range(0, n, COLUMNS):
            hi = min(lo + COLUMNS, n)
            corner = H[lo:hi, lo:hi].double()
            half = D[:, lo:hi] @ corner.triu(1) + D[:, lo:hi] * (corner.diagonal() / 2)
            if lo:
                half += D[:, :lo] @ H[:lo, lo:hi].double()
            totals[top : top + step] += 2 * half.mul_(D[:, lo:hi]).sum(1)
    return totals


def reported_objective(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """`objective` for reports, with errors of some 1e-6 of it; see `reported_objectives`."""
    return reported_objectives(W, Q, [H])[0]


def reported_objectives(W: Tensor, Q: Tensor, Hs: Sequence[Tensor]) -> list[float]:
    """`objective` for each of several H, for reports: on a CPU by products in fp32, which all of them share.

    W, Q: [rows, n], any float dtype. Hs: [n, n] fp32 each, of which only the upper triangles are read. With D = W − Q
    it is Σ H ∘ DᵀD, and an element of DᵀD is off by fp32's rounding of what its column's squares add up to. So how much
    less the whole is than Σ H_jj D_ij² tells how much of fp32 is left: if more than ``CANCELLED`` times, or for other
    dtypes, `objective` is asked. Errors are some 1e-6 of what is found.
    """
    rows, n = W.shape
    if W.device.type != "cpu" or W.dtype == torch.float64 or Q.shape != W.shape:
        return [objective(W, Q, H) for H in Hs]
    found, alone, step = [0.0] * len(Hs), [0.0] * len(Hs), 2 * _rows(n)
    for top in range(0, rows, step):
        D = W[top : top + step].float() - Q[top : top + step]
        for lo in range(0, n, COLUMNS):
            hi = min(lo + COLUMNS, n)
            gram = D[:, :hi].T @ D[:, lo:hi]
            for number, H in enumerate(Hs):
                off_diagonal, diagonal = _shared_sums(gram, H[:hi, lo:hi])
                found[number] += 2 * off_diagonal + diagonal
                alone[number] += diagonal
    return [
        # Also false where fp32 does not hold it.
        whole if H.dtype == torch.float32 and parts <= CANCELLED * whole < math.inf else objective(W, Q, H)
        for H, whole, parts in zip(Hs, found, alone, strict=True)
    ]


def squared_outputs(W: Tensor, H: Tensor) -> float:
    """‖X Wᵀ‖² = tr(W H Wᵀ) with H = XᵀX, for a W that was not made to have small outputs; see `squared_outputs_of`."""
    return squared_outputs_of(W, [H])[0]


def squared_outputs_of(W: Tensor, Hs: Sequence[Tensor]) -> list[float]:
    """tr(W H Wᵀ) for each of several H, for a W that was not made to have small outputs.

    W: [rows, n], any float dtype. Hs: [n, n] each, of which only the upper triangle is read. Weights of 16 bits on a
    CPU go by Σ H ∘ WᵀW, one triangle of products that are exact, summed in fp32: a tenth of the time that `objective`
    takes in fp64, with errors of some 1e-6. Everything else is the work of `objective`.
    """
    n, gram = W.shape[1], None
    if W.device.type == "cpu" and W.dtype.itemsize == 2 and 0 < n <= GRAM_COLUMNS:
        gram = hessian_accumulate_(torch.zeros(n, n), W)
    found = []
    for H in Hs:
        one = math.nan if gram is None else _shared_trace(gram, H)
        # Squares of weights may be beyond fp32.
        found.append(one if math.isfinite(one) else objective(W, torch.zeros_like(W[:1]).expand_as(W), H))
    return found


def _shared_trace(G: Tensor, H: Tensor) -> float:
    """tr(G H) of two symmetric matrices [n, n], of which only the upper triangles are read."""
    n, total = len(G), 0.0
    for lo in range(0, n, COLUMNS):
        hi = min(lo + COLUMNS, n)
        off_diagonal, diagonal = _shared_sums(G[:hi, lo:hi], H[:hi, lo:hi])
        total += 2 * off_diagonal + diagonal
    return total


def _shared_sums(G: Tensor, H: Tensor) -> tuple[float, float]:
    """Σ G ∘ H above the diagonals and on them, of some columns [hi, columns] of symmetric matrices down to these.

    A row's products are summed in fp32, which is many times faster, and the rows' sums in fp64.
    """
    products = G * H
    corner = products[-products.shape[1] :]
    diagonal = corner.diagonal().sum(dtype=torch.float64)
    corner.triu_(1)
    return float(products.sum(1).sum(dtype=torch.float64)), float(diagonal)


def reconstruction_error(Q: Tensor, H: Tensor, C: Tensor, power: float, own: float | None = None) -> float:
    """‖X Qᵀ − Y‖² = tr(Q H Qᵀ) − 2 tr(Q C) + ‖Y‖² with H = XᵀX and C = XᵀY, in fp64, at least 0.

    Q: [rows, n], any float dtype. H: [n, n], of which only the upper triangle is read. C: [n, rows]. ``power``: ‖Y‖².
    ``own``: tr(Q H Qᵀ) where it is known already, as by `squared_outputs`.
    Where the error is a small part of ‖Y‖², that part is known no better than the sums in H, C and ``power`` are.
    """
    rows, n = Q.shape
    if C.shape != (n, rows):
        raise ValueError(f"C must be [{n}, {rows}] to fit Q {list(Q.shape)}, not {list(C.shape)}")
    if own is None:
        own = objective(Q, torch.zeros_like(Q[:1]).expand_as(Q), H)
    shared = 0.0
    step = _rows(n)
    for top in range(0, rows, step):
        some = slice(top, top + step)
        shared += float((Q[some].double() * C[:, some].T.double()).sum())
    return max(own - 2 * shared + power, 0.0)


def _rows(n: int) -> int:
    return max(ROWS_BYTES // (8 * max(n, 1)), 1)


def workspace(rows: int, n: int) -> int:
    """Bytes that each function here takes for a Q [rows, n] at most, beside what it is given."""
    some = min(rows, _rows(n))
    products = 8 * some * n + 8 * COLUMNS * (3 * some + 2 * min(COLUMNS, n) + n)
    gram = 4 * n * (n + rows) if n <= GRAM_COLUMNS else 0
    return max(24 * some * n, products, gram)
