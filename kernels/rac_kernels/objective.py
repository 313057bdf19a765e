"""The layer objective: how far a pruned matrix moves its outputs on the calibration tokens."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 4096  # rows held in fp64 at a time
COLUMNS = 512


def objective(W: Tensor, Q: Tensor, H: Tensor) -> float:
    """‖X Wᵀ − X Qᵀ‖² = tr((W − Q) H (W − Q)ᵀ) with H = XᵀX, in fp64 throughout.

    W, Q: [rows, n], any float dtype. H: [n, n], of which only the upper triangle is read. Chunks of rows and columns
    are widened as they are used, so nothing of H's size is allocated. Costs rows·n² FLOP, half of the full product.
    """
    rows, n = W.shape
    if Q.shape != W.shape or H.shape != (n, n):
        raise ValueError(f"shapes do not fit: W {tuple(W.shape)}, Q {tuple(Q.shape)}, H {tuple(H.shape)}")
    total = torch.zeros((), dtype=torch.float64, device=W.device)
    for top in range(0, rows, ROWS):
        D = W[top : top + ROWS].double() - Q[top : top + ROWS].double()
        for lo in range(0, n, COLUMNS):
            hi = min(lo + COLUMNS, n)
            corner = H[lo:hi, lo:hi].double()
            half = D[:, lo:hi] @ corner.triu(1) + D[:, lo:hi] * (corner.diagonal() / 2)
            if lo:
                half += D[:, :lo] @ H[:lo, lo:hi].double()
            total += 2 * torch.dot(half.flatten(), D[:, lo:hi].flatten())
    return float(total)
