"""ADMM for the best mask: min tr((Q − W) H (Q − W)ᵀ) with at most k of Q's weights, or N in M, not zero.

Two copies of the weights, V free and Q on a mask, are drawn together by a penalty ρ with multipliers L:

    V ← (H + ρI)⁻¹ (H Wᵀ − Lᵀ + ρ Qᵀ),   Q ← the k largest of V + L/ρ,   L ← L + ρ (V − Q).

H is scaled to a unit diagonal first, so that one ρ suits all columns. ρ starts low, where the mask moves freely, and
rises faster the more of the mask has moved since the last check; the mask that no longer moves is the result. One
eigendecomposition of H serves every ρ.

Reference: Meng et al., "ALPS" (NeurIPS 2024, arXiv 2406.07831): ρ from 0.1, a check every 3 steps, ρ times 1.3, 1.2 or
1.1 where at least 10%, 0.5% or one of k positions changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from rac_kernels.factor import Factor, refactor_
from rac_kernels.pattern import Pattern, parse_pattern
from rac_kernels.refine import System, symmetric_product
from rac_kernels.select import mask_by_score

FIRST_PENALTY = 0.1
CHECK = 3
RENEW = 5  # steps of a short run with one penalty
SHORT_RANGE = 6.0  # of the penalty, from the first to the last step of a short run
RELAXATION = 1.3  # of a short run: V is taken so far beyond Q
RAISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # of the penalty, by the share of the mask that moved


def admm(
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


def admm_short_(
    W: Tensor,
    factor: Factor,
    sparsity: float = 0.5,
    pattern: str | Pattern | None = None,
    steps: int = 40,
    row_groups: Sequence[int] | None = None,
) -> Tensor:
    """Q [rows, n] fp32 as by `admm` for H + λI, by a fixed number of steps and a penalty that rises at a fixed pace.

    W: [rows, n], any float dtype. ``factor`` is of H + λI and says both; its U is overwritten. Nothing is scaled: the
    penalty is ρ diag(H + λI), which comes to the same. ρ grows from 0.1 to 0.6 over the steps, over-relaxed by 1.3
    (Boyd et al., "Distributed optimization and statistical learning via ADMM", 2011, 3.4.3), in which H + λI and the
    penalty are factored anew every RENEW steps, n³/3 FLOP in the memory that U has. A step is 2·rows·n² FLOP: two
    triangular solves, or where there are at least n rows a product with the inverse, made for 3n³ FLOP. Beside U, six
    matrices of W's size in fp32 and a mask are held. ``row_groups``: row counts of matrices stacked in W, each with its
    own zeros to reach. Other arguments as for `admm`.
    """
    n = len(factor.diagonal)
    if W.ndim != 2 or W.shape[1] != n or steps < 1:
        raise ValueError(f"factor of H [{n}, {n}] must fit W {list(W.shape)}, steps {steps} be at least 1")
    pattern, U = parse_pattern(pattern), factor.U
    weight = factor.damped
    root = weight.sqrt()
    groups = [len(W)] if row_groups is None else list(row_groups)
    Q = W.to(U.dtype, copy=True)
    pull = symmetric_product(Q, System(U, "lower", weight, weight), torch.empty_like(Q))
    drift = torch.zeros_like(Q)  # L by the penalty: what is not zero of it is what Q lacks
    growth = SHORT_RANGE ** (1 / max(-(-steps // RENEW) - 1, 1))
    penalty, inverse = FIRST_PENALTY, None
    for step in range(steps):
        if step % RENEW == 0:
            if step:
                penalty *= growth
                drift /= growth
            inverse = None
            refactor_(factor, penalty * weight)
            if n <= len(W):
                inverse = _inverse(U)
        V = torch.addcmul(pull, Q - drift, weight, value=penalty)
        if inverse is not None:
            V = V @ inverse
        else:
            half = torch.linalg.solve_triangular(U.T, V, upper=False, left=False)
            V = torch.linalg.solve_triangular(U, half, upper=True, left=False)
            del half
        if step:
            drift.add_(V, alpha=RELAXATION).add_(Q, alpha=1 - RELAXATION)
        else:
            drift.copy_(V)  # Q is W as yet, on no mask
        del V
        Q.copy_(drift)
        for part, own in zip(Q.split(groups), drift.split(groups), strict=True):
            # Multiplied: to fill by a mask takes longer than all else here.
            own.mul_(mask_by_score((part * root).abs_(), sparsity, pattern, per="matrix"))
        Q.sub_(drift)
    return Q.add_(0.0)


def _inverse(U: Tensor) -> Tensor:
    """(U Uᵀ)⁻¹ of the upper triangle of U [n, n]."""
    inverse = torch.linalg.solve_triangular(U, torch.eye(len(U), dtype=U.dtype, device=U.device), upper=True)
    return inverse.T @ inverse


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
