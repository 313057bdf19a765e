"""Exact selection: the k-th smallest score, and masks with exactly k elements. No sorting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rac_kernels import cuda, gpu, native
from rac_kernels.backend import choose
from rac_kernels.gpu import tl
from rac_kernels.pattern import Pattern, check_pattern_fits, check_sparsity, parse_pattern, zeros_of


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
        return smallest_per_row(scores, zeros_of(sparsity, n))
    return smallest(scores, zeros_of(sparsity, scores.numel()))


# Selection on a GPU, for the sweep: radix on the bit patterns, which for non-negative floats are in the floats' order.
# Three counts of 11, 11 and 9 bits, then the ties; nothing waits for the host, and sums of integers come out the same
# in any order.
BINS = 2048
LEVELS = 3
COUNTED = 2048  # scores a program counts at a time
WARPS = 8  # four spill with Triton before 3.9
PROGRAM_SCORES = 16 * COUNTED


@gpu.jit()
def find_digit(counts, k, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bin that the k-th smallest falls into, what k is among the bin's own, and how many these are."""
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins)
    digit = tl.sum((tl.cumsum(count, 0) < k).to(tl.int32), 0)
    below = tl.sum(tl.where(bins < digit, count, 0), 0)
    return digit, k - below, tl.sum(tl.where(bins == digit, count, 0), 0)


@gpu.jit()
def count_kernel(  # type: ignore[no-untyped-def]
    scores, groups, state, LEVEL: tl.constexpr, BINS: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr
):
    """Adds the digits of level LEVEL to the group's counts, of those scores that share the k-th's digits before."""
    group = tl.program_id(1)
    first = tl.load(groups + 3 * group)
    count = tl.load(groups + 3 * group + 1)
    k = tl.load(groups + 3 * group + 2).to(tl.int32)
    own = state + group * 3 * BINS
    prefix = 0
    if LEVEL > 0:
        digit, k, _equal = find_digit(own, k, BINS)
        prefix = digit
    if LEVEL > 1:
        digit, k, _equal = find_digit(own + BINS, k, BINS)
        prefix = prefix * 2048 + digit
    total = tl.zeros((BINS,), tl.int32)
    begin = tl.program_id(0).to(tl.int64) * (STEP * STEPS)
    for step in range(STEPS):
        i = begin + step * STEP + tl.arange(0, STEP)
        key = tl.load(scores + first + i, mask=i < count, other=0.0).to(tl.int32, bitcast=True)
        if LEVEL == 0:
            total += tl.histogram(key >> 20, BINS, mask=i < count)
        elif LEVEL == 1:
            total += tl.histogram((key >> 9) & 2047, BINS, mask=(i < count) & (key >> 20 == prefix))
        else:
            total += tl.histogram(key & 511, BINS, mask=(i < count) & (key >> 9 == prefix))
    tl.atomic_add(own + LEVEL * BINS + tl.arange(0, BINS), total, mask=total > 0, sem="relaxed")


@gpu.jit()
def resolve_kernel(scores, groups, state, thresholds, last, BINS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group's threshold and the position of the last score equal to it that goes; the counts become zero again."""
    group = tl.program_id(0)
    first = tl.load(groups + 3 * group)
    count = tl.load(groups + 3 * group + 1)
    wanted = tl.load(groups + 3 * group + 2).to(tl.int32)
    own = state + group * 3 * BINS
    high, k, _equal = find_digit(own, wanted, BINS)
    middle, k, _equal = find_digit(own + BINS, k, BINS)
    low, k, equal = find_digit(own + 2 * BINS, k, BINS)
    key = (high << 20) | (middle << 9) | low
    at = count - 1
    if k < equal:
        # More scores than may go equal the threshold: look for the k-th of them.
        found = 0
        begin = tl.zeros((), tl.int64)
        while found < k:
            i = begin + tl.arange(0, STEP)
            same = tl.load(scores + first + i, mask=i < count, other=-1.0).to(tl.int32, bitcast=True) == key
            rank = found + tl.cumsum(same.to(tl.int32), 0)
            at = begin + tl.sum(tl.where(same & (rank == k), tl.arange(0, STEP), 0), 0)
            found += tl.sum(same.to(tl.int32), 0)
            begin += STEP
    tl.store(thresholds + group, tl.where(wanted > 0, key.to(tl.float32, bitcast=True), -1.0))
    tl.store(last + group, tl.where(wanted > 0, at, -1))
    tl.debug_barrier()
    for level in range(3):
        tl.store(own + level * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int32))


@gpu.kept
def _group_table(counts: tuple[int, ...], ks: tuple[int, ...], device: torch.device) -> Tensor:
    """[groups, 3] int64: where each group's scores begin, how many they are, how many go."""
    starts = [sum(counts[:g]) for g in range(len(counts))]
    return torch.tensor(list(zip(starts, counts, ks, strict=True)), dtype=torch.int64, device=device).view(-1, 3)


class Selection:
    """The k smallest scores of several groups at once, on a GPU, without waiting for it: in one launch of "cuda", in
    four of "triton"."""

    def __init__(self, groups: int, device: torch.device, backend: str) -> None:
        self.thresholds = torch.empty(groups, dtype=torch.float32, device=device)
        self.last = torch.empty(groups, dtype=torch.int64, device=device)
        self._cuda = backend == "cuda"
        if self._cuda:
            self._state = cuda.selection_state(groups, device)
        else:
            self._state = torch.zeros(groups, LEVELS, BINS, dtype=torch.int32, device=device)

    def run(self, scores: Tensor, counts: Sequence[int], ks: Sequence[int]) -> None:
        """scores: fp32, >= 0 and not NaN, the groups' one after the other, `counts` elements each. What goes of group
        g, the first ks[g] in the order of score and position, is < thresholds[g], or == it at a position within the
        group <= last[g]."""
        if self._cuda:
            cuda.select_thresholds(scores, counts, ks, self._state, (self.thresholds, self.last))
            return
        table = _group_table(tuple(counts), tuple(ks), scores.device)
        grid = (max(-(-max(counts) // PROGRAM_SCORES), 1), len(counts))
        for level in range(LEVELS):
            fixed = {"LEVEL": level, "BINS": BINS, "STEP": COUNTED, "STEPS": PROGRAM_SCORES // COUNTED}
            count_kernel[grid](scores, table, self._state, **fixed, num_warps=WARPS)
        resolve_kernel[(len(counts),)](
            scores, table, self._state, self.thresholds, self.last, BINS=BINS, STEP=COUNTED, num_warps=WARPS
        )
