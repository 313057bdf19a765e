"""The layer objective: how far a pruned matrix moves its outputs on the calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_BYTES = 128 << 20  # bytes of rows held in fp64 at a time

COLUMNS = 512


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


def reconstruction_error(Q: Tensor, H: Tensor, C: Tensor, power: float) -> float:
    """‖X Qᵀ − Y‖² = tr(Q H Qᵀ) − 2 tr(Q C) + ‖Y‖² with H = XᵀX and C = XᵀY, in fp64, at least 0.

    Q: [rows, n], any float dtype. H: [n, n], of which only the upper triangle is read. C: [n, rows]. ``power``: ‖Y‖².
    Where the error is a small part of ‖Y‖², that part is known no better than the sums in H, C and ``power`` are.
    """
    rows, n = Q.shape
    if C.shape != (n, rows):
        raise ValueError(f"C must be [{n}, {rows}] to fit Q {list(Q.shape)}, not {list(C.shape)}")
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
    """Bytes that `objective` and `reconstruction_error` take for a Q [rows, n], beside what they are given."""
    some = min(rows, _rows(n))
    products = 8 * some * n + 8 * COLUMNS * (3 * some + 2 * min(COLUMNS, n) + n)
    return max(24 * some * n, products)
