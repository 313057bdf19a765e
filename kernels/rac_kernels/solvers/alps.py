"""ADMM for the mask as published, one eigendecomposition of H for every penalty, until the mask stands still.

Reference: Meng et al., "ALPS" (NeurIPS 2024, arXiv 2406.07831): ρ from 0.1, a check every 3 steps, ρ times 1.3, 1.2 or
1.1 where at least 10%, 0.5% or one of k positions changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rac_kernels.ops.pattern import Pattern, parse_pattern
from rac_kernels.ops.select import mask_by_score
from rac_kernels.solvers.admm import FIRST_PENALTY

CHECK = 3

RAISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the mask that moved, and the penalty's factor from there on


def alps(
    weights: Sequence[Tensor],
    H: Tensor,
    sparsity: float = 0.5,
    pattern: str | Pattern | None = None,
    steps: int = 300,
) -> Iterator[tuple[Tensor, int]]:
    """For each of the `weights` [rows, n], any float dtype, in turn: Q [rows, n] fp32 and the steps it took.

    H: [n, n] fp32 or fp64, full, symmetric and positive definite (damped); read only. Exactly
    floor(sparsity · rows · n) of each Q are +0.0, compared within the whole matrix, or M − N in each group of M columns
    with a pattern "N:M". Ends after `steps`, or when no position changed between two checks.

    Raises ValueError for shapes, sparsity or pattern that do not fit.
    """
    n = H.shape[0]
    if H.shape != (n, n) or any(W.ndim != 2 or W.shape[1] != n for W in weights):
        raise ValueError(f"H {list(H.shape)} must be square and fit weights {[list(W.shape) for W in weights]}")
    pattern = parse_pattern(pattern)
    scale = H.diagonal().sqrt()
    scaled = H / scale / scale[:, None]
    values, vectors = torch.linalg.eigh(scaled)
    for W in weights:
        Q, took = _one(W.to(H.dtype) * scale, scaled, values, vectors, sparsity, pattern, steps)
        yield (Q / scale).add_(0.0), took


def _one(
    W: Tensor, H: Tensor, values: Tensor, vectors: Tensor, sparsity: float, pattern: Pattern | None, steps: int
) -> tuple[Tensor, int]:
    def goes(weights: Tensor) -> Tensor:
        return mask_by_score(weights.abs(), sparsity, pattern, per="matrix")

    pull, penalty = W @ H, FIRST_PENALTY
    Q, L = W, torch.zeros_like(W)
    mask = goes(W)
    kept = max(mask.numel() - int(mask.sum()), 1)
    # A penalty lasts CHECK steps. Its inverse takes 2n³ FLOP and then one product a step instead of two.
    inverse, invert = None, H.shape[0] < CHECK * len(W)
    for step in range(1, steps + 1):
        right = pull - L + penalty * Q
        if invert:
            if inverse is None:
                inverse = (vectors / (values + penalty)) @ vectors.T
            V = right @ inverse
        else:
            V = ((right @ vectors) / (values + penalty)) @ vectors.T
        Q = V + L / penalty
        new = goes(Q)
        Q = Q.masked_fill(new, 0)
        L = L + penalty * (V - Q)
        if step % CHECK == 0:
            moved = int((new != mask).sum())
            if not moved:
                return Q, step
            mask = new
            penalty *= next(factor for share, factor in RAISES if moved >= share * kept)
            inverse = None
    return Q, steps


def held(n: int) -> int:
    """Bytes that `admm` holds of H [n, n] in fp32: itself, scaled, its eigenvectors, and an inverse."""
    return 16 * n * n


def workspace(weights: int, n: int) -> int:
    """Bytes that `admm` takes beside, of so many weights in rows of n or for the eigenvectors of H."""
    return max(32 * weights, 12 * n * n)
