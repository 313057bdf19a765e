"""Exact selection: the k-th smallest score, and masks with exactly k elements. No sorting."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels import native
from rac_kernels.backend import choose
from rac_kernels.pattern import Pattern, check_pattern_fits, check_sparsity, parse_pattern


def kth_smallest(scores: Tensor, k: int, backend: str = "auto") -> Tensor:
    """The k-th smallest element of ``scores`` (any shape, 1 <= k <= numel) as a 0-d tensor; NaN counts as largest."""
    if not 1 <= k <= scores.numel():
        raise ValueError(f"k = {k} must lie between 1 and the number of scores, {scores.numel()}")
    return _kth_op(scores, k, choose(backend, scores.device))


@torch.library.custom_op("rac::kth_smallest", mutates_args=())
def _kth_op(scores: Tensor, k: int, backend: str) -> Tensor:
    if backend == "native" and scores.dtype == torch.float32:
        scores = scores.contiguous()
        found = native.library().kth_smallest(scores.data_ptr(), scores.numel(), k, native.threads())
        return scores.new_tensor(found)
    return scores.reshape(-1).kthvalue(k).values


@_kth_op.register_fake
def _(scores: Tensor, k: int, backend: str) -> Tensor:
    return scores.new_empty(())


def smallest(scores: Tensor, k: int) -> Tensor:
    """Bool mask, shaped as ``scores``, of the k smallest; among equal scores the earliest in row-major order."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = kth_smallest(scores, k)
    mask = (scores <= bound).contiguous()
    surplus = int(mask.sum()) - k
    if surplus:
        ties = (scores == bound).flatten().nonzero().flatten()
        mask.view(-1)[ties[ties.numel() - surplus :]] = False
    return mask


def smallest_per_row(scores: Tensor, k: int) -> Tensor:
    """Bool mask [rows, n] of the k smallest scores in each row; among equal scores the leftmost."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = scores.kthvalue(k, dim=1, keepdim=True).values
    mask = scores <= bound
    crowded = (mask.sum(1) > k).nonzero().flatten()  # rows in which more scores equal the bound than may go
    if crowded.numel():
        ties = scores[crowded] == bound[crowded]
        below = mask[crowded] & ~ties
        mask[crowded] = below | (ties & (ties.cumsum(1) <= k - below.sum(1, keepdim=True)))
    return mask


def smallest_per_group(scores: Tensor, pattern: Pattern) -> Tensor:
    """Bool mask [rows, n] of the M − N smallest scores in each group of M columns; among equal scores the leftmost."""
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
    n = scores.shape[1]
    parsed = parse_pattern(pattern)
    if parsed is not None:
        check_pattern_fits(parsed, n)
        return smallest_per_group(scores, parsed)
    if per == "row":
        return smallest_per_row(scores, int(sparsity * n))
    return smallest(scores, int(sparsity * scores.numel()))
