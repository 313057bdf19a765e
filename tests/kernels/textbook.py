"""SparseGPT as published (Frantar, Alistarh, arXiv 2301.00774), in fp64 and with no thought for speed."""

from __future__ import annotations

import torch
from torch import Tensor


def sparsegpt(
    W: Tensor,
    H: Tensor,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    block_size: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """The right-looking loop over the columns of W [rows, n] under a full H [n, n]; `pattern` (N, M) keeps N of M."""
    W, H = W.double().clone(), H.double().clone()
    n = W.shape[1]
    dead = H.diagonal() == 0
    ridge = damping * H.diagonal()[~dead].mean()  # over live columns; as published where there are no others
    W[:, dead] = 0
    H.diagonal()[:] += ridge
    H.diagonal()[dead] = 1
    R = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for lo in range(0, n, block_size):
        hi = min(lo + block_size, n)
        block, errors = W[:, lo:hi], torch.zeros_like(W[:, lo:hi])
        scale = R.diagonal()[lo:hi]
        prune = torch.zeros_like(block, dtype=torch.bool)
        if pattern is None:
            scores = (block / scale).square().flatten()
            prune.view(-1)[scores.argsort(stable=True)[: int(sparsity * scores.numel())]] = True
        for j in range(hi - lo):
            if pattern is not None and j % pattern[1] == 0:
                keep, group = pattern
                scores = (block[:, j : j + group] / scale[j : j + group]).square()
                prune[:, j : j + group].scatter_(1, scores.argsort(dim=1, stable=True)[:, : group - keep], True)
            kept = block[:, j].masked_fill(prune[:, j], 0)
            errors[:, j] = (block[:, j] - kept) / scale[j]
            block[:, j + 1 :] -= errors[:, j, None] * R[lo + j, lo + j + 1 : hi]
            block[:, j] = kept
        W[:, hi:] -= errors @ R[lo:hi, hi:]
    return W
