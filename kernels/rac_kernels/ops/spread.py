"""An order of columns in which a pattern N:M costs least: large weights of a row apart, so that each group keeps one.

The sum of what the pattern keeps, Σ over rows and groups of the N largest scores, rises by exchanging columns of two
groups; exchanges that meet no common group are made together, the best first, until none is worth it. The start deals
out the columns by their sums, the largest to different groups.

Reference: for 2:4, Pool and Yu, "Channel permutations for N:M sparsity" (NeurIPS 2021), which searches otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels.ops.pattern import Pattern, parse_pattern

ROUNDS = 12

ROWS = 512  # rows of the scores that count, evenly spaced

COLUMNS = 1024  # columns among which exchanges are looked for, others in each round: both bound the time

WORTH = 1e-5  # share of a column's part of the sum: less gained is not worth an exchange

LOOKS = 4  # best exchanges a column, of which some stand in each other's way


def spread_columns(scores: Tensor, pattern: str | Pattern) -> Tensor:
    """Order [n] int64 of the columns of `scores` [rows, n] fp32, not negative: column j of the result is order[j].

    n must be whole groups of M. 2·rows·n·min(n, COLUMNS) operations a round. The result depends on the scores alone.
    Raises ValueError for a pattern that does not fit.
    """
    parsed = parse_pattern(pattern)
    rows, n = scores.shape
    if parsed is None or n % parsed[1]:
        raise ValueError(f"pattern {pattern} must have whole groups in {n} columns")
    keep, size = parsed
    if rows > ROWS:
        scores = scores[torch.arange(ROWS, device=scores.device) * rows // ROWS]
    order = scores.sum(0).argsort(descending=True, stable=True).view(size, n // size).T.flatten()
    if keep == size:
        return order
    draw = torch.Generator().manual_seed(0)
    least = WORTH * float(scores.sum()) / max(n, 1)
    each = max(COLUMNS // size, 2)  # groups that are looked at together
    for _ in range(ROUNDS):
        made = 0
        groups = torch.randperm(n // size, generator=draw).to(order.device) if n // size > each else None
        for lo in range(0, n // size, each):
            some = torch.arange(lo, min(lo + each, n // size), device=order.device)
            some = some if groups is None else groups[some]
            at = (some[:, None] * size + torch.arange(size, device=order.device)).flatten()
            own = order[at]
            made += _exchange(scores[:, own], own, keep, size, least)
            order[at] = own
        if not made:
            break
    return order


def pattern_order(W: Tensor, norms: Tensor, pattern: str | Pattern) -> Tensor:
    """Order [n] int64 of the columns of W [rows, n], any float dtype, in which the pattern N:M costs least.

    norms [n] fp32 are Σ_t x_tj², finite and at least 0; a weight's score is w_ij² norms_j. See `spread_columns`.
    """
    return spread_columns(W.to(torch.float32).square().mul_(norms), pattern)


def _exchange(scores: Tensor, order: Tensor, keep: int, size: int, least: float) -> int:
    """Exchange columns of `scores` [rows, n], in groups of `size`, in their `order`; returns how many pairs were."""
    rows, n = scores.shape
    grouped = scores.view(rows, n // size, size)
    # For each column, of the others in its group: the sum of the `keep` largest, and the least of these.
    largest, places = grouped.topk(min(keep + 1, size), dim=2)
    whole = largest[..., :keep].sum(2, keepdim=True)
    among = torch.zeros_like(grouped, dtype=torch.bool).scatter_(2, places[..., :keep], True)
    bound = torch.where(among, largest[..., keep:], largest[..., keep - 1 : keep])
    rest = torch.where(among, whole - grouped + largest[..., keep:], whole)
    bound, rest = bound.reshape(rows, n), rest.sum(0).flatten()
    gain = torch.empty(n, n, dtype=scores.dtype, device=scores.device)
    above = torch.empty_like(scores)  # one for all columns: new memory for each costs more than the arithmetic
    for column in range(n):  # what its group keeps with each other column in its place
        torch.sub(scores, bound[:, column : column + 1], out=above)
        torch.sum(above.clamp_(min=0), 0, out=gain[column])
    gain += (rest - whole.sum(0).repeat_interleave(size))[:, None]
    gain += gain.T.clone()
    group = torch.arange(n, device=scores.device) // size
    gain.masked_fill_(group[:, None] >= group, 0)
    values, found = gain.flatten().topk(min(LOOKS * n, n * n))
    taken, made, now = set[int](), 0, order.tolist()
    for value, place in zip(values.tolist(), found.tolist(), strict=True):
        if value <= least:
            break
        i, j = divmod(place, n)
        if taken.isdisjoint((i // size, j // size)):
            taken.update((i // size, j // size))
            now[i], now[j] = now[j], now[i]
            made += 1
    order.copy_(torch.tensor(now, dtype=order.dtype))
    return made
