"""Exact selection: the k-th smallest score, and masks with exactly k elements. No sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels.pattern import Pattern, check_pattern_fits, check_sparsity, parse_pattern


def kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest element of ``scores`` (any shape, 1 <= k <= numel), as a 0-d tensor. NaN counts as largest."""
    if not 1 <= k <= scores.numel():
        raise ValueError(f"k = {k} must lie between 1 and the number of scores, {scores.numel()}")
    return scores.reshape(-1).kthvalue(k).values


def smallest_per_row(scores: Tensor, k: int) -> Tensor:
    """Bool mask [rows, n] of the k smallest scores in each row; among equal scores the leftmost go first."""
    rows, n = scores.shape
    if k == 0 or k == n:
        return torch.full_like(scores, k == n, dtype=torch.bool)
    bound = scores.kthvalue(k, dim=1, keepdim=True).values
    mask = scores <= bound
    crowded = (mask.sum(1) > k).nonzero().flatten()  # rows where more scores equal the bound than may go
    if crowded.numel():
        below = scores[crowded] < bound[crowded]
        ties = mask[crowded] & ~below
        allowed = k - below.sum(1, keepdim=True)
        mask[crowded] = below | (ties & (ties.cumsum(1) <= allowed))
    return mask


def smallest_per_group(scores: Tensor, pattern: Pattern) -> Tensor:
    """Bool mask [rows, n] of the M − N smallest scores in each group of M columns; ties: the leftmost go first."""
    keep, group = pattern
    groups = scores.unflatten(1, (-1, group))
    rank = torch.zeros(groups.shape, dtype=torch.int16, device=scores.device)
    for column in range(group):  # how many scores of its group go before each one
        other = groups[..., column, None]
        rank += other < groups
        rank[..., column + 1 :] += other == groups[..., column + 1 :]
    return (rank < group - keep).flatten(1)


def mask_by_score(
    scores: Tensor, sparsity: float = 0.5, pattern: str | Pattern | None = None, per: str = "row"
) -> Tensor:
    """Bool mask [rows, n], True where the weight goes: ``W.masked_fill(mask, 0)`` prunes (and leaves +0.0).

    scores: [rows, n] float; small scores go first, among equal ones the earliest in row-major order. Exactly
    floor(sparsity · n) go in each row (``per="row"``, as Wanda compares), or floor(sparsity · rows · n) in the matrix
    (``per="matrix"``, magnitude pruning). With a pattern N:M, exactly M − N go in each group and sparsity is not
    used. Raises ValueError for NaN scores, sparsity outside [0, 1] or columns not in whole groups of M.
    """
    check_sparsity(sparsity)
    if per not in ("row", "matrix"):
        raise ValueError(f"per must be 'row' or 'matrix', not {per!r}")
    if scores.isnan().any():
        raise ValueError("scores contain NaN")
    rows, n = scores.shape
    parsed = parse_pattern(pattern)
    if parsed is not None:
        check_pattern_fits(parsed, n)
        return smallest_per_group(scores, parsed)
    if per == "row":
        return smallest_per_row(scores, int(sparsity * n))
    return smallest_per_row(scores.reshape(1, -1), int(sparsity * scores.numel())).view(rows, n)
