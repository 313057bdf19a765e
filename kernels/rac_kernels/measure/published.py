"""The published steps, written plainly, in whatever dtype is given: the kernels are tested and timed against them.

They do what IST-DASLab's SparseGPT does (Frantar, Alistarh, arXiv 2301.00774): a full XᵀX, three factorizations, one
column at a time. They run on any device. In fp64 they are what is true, in fp32 what there was.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hessian_(H: Tensor, X: Tensor) -> Tensor:
    """H [n, n] += XᵀX, all of it, from X [tokens, n] cast to H's dtype."""
    x = X.to(H.dtype)
    return H.addmm_(x.T, x)


def inverse_factor(H: Tensor, damping: float = 0.01) -> Tensor:
    """R [n, n] upper with (H + λI)⁻¹ = RᵀR, by Cholesky, inverse and Cholesky again; H, all of it, is not changed.

    λ is ``damping`` by the mean of H_ii over the columns that are not dead, and 1 takes the place of a dead H_ii: as
    published where there are none, which there count as 1 in the mean.
    """
    H = H.clone()
    diagonal = H.diagonal()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum()
    diagonal.copy_(torch.where(dead, 1.0, diagonal + damping * mean))
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def sweep(W: Tensor, R: Tensor, sparsity: float, pattern: tuple[int, int] | None = None, block: int = 128) -> Tensor:
    """The right-looking loop over columns with lazy updates of a block: Q [rows, n] from W and R, in R's dtype.

    ``pattern`` (N, M) keeps N of M. Without one floor(sparsity · weights) of a block go, and those equal to the last.
    """
    W = W.to(R.dtype, copy=True)
    columns = W.shape[1]
    for lo in range(0, columns, block):
        hi = min(lo + block, columns)
        part, corner = W[:, lo:hi].clone(), R[lo:hi, lo:hi]
        errors, scale = torch.zeros_like(part), corner.diagonal()
        mask = torch.zeros_like(part, dtype=torch.bool)
        if pattern is None and (count := int(part.numel() * sparsity)):
            scores = part.square() / scale.square()
            mask = scores <= scores.flatten().sort().values[count - 1]
        for j in range(hi - lo):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                scores = part[:, group].square() / scale[group].square()
                mask.scatter_(1, j + scores.topk(pattern[1] - pattern[0], largest=False).indices, True)
            kept = part[:, j].masked_fill(mask[:, j], 0)
            error = (part[:, j] - kept) / scale[j]
            part[:, j:] -= error[:, None] @ corner[None, j, j:]
            part[:, j], errors[:, j] = kept, error
        W[:, lo:hi] = part
        W[:, hi:] -= errors @ R[lo:hi, hi:]
    return W


def sparsegpt(
    W: Tensor,
    H: Tensor,
    sparsity: float = 0.5,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """All of it, in fp64: Q [rows, n] from W and a full H [n, n]; dead columns become zero."""
    H = H.double()
    W = torch.where(H.diagonal() == 0, 0.0, W.double())
    return sweep(W, inverse_factor(H, damping), sparsity, pattern, block)


def column_norm_(s: Tensor, X: Tensor) -> Tensor:
    """s [n] fp32 += the squared norms of the columns of X [tokens, n], cast to fp32, as Wanda's code takes them."""
    return s.add_(torch.norm(X.float(), p=2, dim=0) ** 2)


def conjugate_gradients(Q: Tensor, H: Tensor, target: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Masked conjugate gradients as ALPS runs them (arXiv 2406.07831), an operation a line; H [n, n] full."""
    inverse = 1 / H.diagonal()
    Q = Q * mask
    R = (target - Q) @ H * mask
    Z = R * inverse
    P = Z.clone()
    size = (R * Z).sum(1, keepdim=True)
    for _ in range(iterations):
        A = P @ H
        step = size / (P * A).sum(1, keepdim=True)
        Q = Q + step * P
        R = (R - step * A) * mask
        Z = R * inverse
        new = (R * Z).sum(1, keepdim=True)
        P = Z + new / size * P
        size = new
    return Q
