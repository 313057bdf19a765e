"""Exact selection: the k-th smallest score, and masks with exactly k elements. No sorting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rac_kernels.backends import cuda, gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.limits import Limit
from rac_kernels.ops.pattern import Pattern, check_pattern_fits, check_sparsity, parse_pattern, zeros_of


def kth_smallest(scores: Tensor, k: int, backend: str = "auto") -> Tensor:
    """The k-th smallest element of ``scores`` (any shape, 1 <= k <= numel) as a 0-d tensor; NaN counts as largest.

    Nothing waits for a GPU. ``backend`` as in `rac_kernels.backends.choose`; fp64 is the reference's work.
    """
    if not 1 <= k <= scores.numel():
        raise ValueError(f"k = {k} must lie between 1 and the number of scores, {scores.numel()}")
    fits = _fits(scores)
    return _kth_op(scores, k, choose(backend, scores.device, triton=fits, cuda=fits))


def _fits(scores: Tensor) -> bool:
    """Whether the kernels take them: 32-bit counts of what is, or becomes without loss, fp32."""
    return scores.dtype in native.DTYPES and scores.numel() < 2**31


@torch.library.custom_op("rac::kth_smallest", mutates_args=())
def _kth_op(scores: Tensor, k: int, backend: str) -> Tensor:
    if backend == "native" and scores.dtype == torch.float32:
        scores = scores.contiguous()
        found = native.library().kth_smallest(scores.data_ptr(), scores.numel(), k, native.threads())
        return scores.new_tensor(found)
    if backend in ("triton", "cuda"):
        selection = Selection(1, scores.device, backend)
        selection.run(scores.float().contiguous(), [scores.numel()], [k])
        return selection.thresholds[0].to(scores.dtype)
    return scores.reshape(-1).kthvalue(k).values


@_kth_op.register_fake
def _(scores: Tensor, k: int, backend: str) -> Tensor:
    return scores.new_empty(())


def smallest(scores: Tensor, k: int, backend: str = "reference") -> Tensor:
    """Bool mask, shaped as ``scores``, of the k smallest; among equal scores the earliest in row-major order."""
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    bound = _kth_op(scores, k, backend)
    mask = (scores <= bound).contiguous()
    surplus = int(mask.count_nonzero()) - k  # a sum would make integers of them all first
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


def _spread_over_rows(scores: Tensor, k: int, per_row: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Bool mask [rows, n] of k scores in all, chosen within each row by `per_row`; nothing waits for a GPU.

    Of the first r rows floor(r · k / rows) go, so that any two rows differ by one at most.
    """
    rows = len(scores)
    each, more = divmod(k, max(rows, 1))
    if not more:
        return per_row(scores, each)
    ends = torch.arange(rows + 1, device=scores.device) * more // rows
    order = ends.diff().argsort(stable=True)  # the rows of one more last
    mask = torch.empty_like(scores, dtype=torch.bool)
    for some, count in ((order[: rows - more], each), (order[rows - more :], each + 1)):
        mask.index_copy_(0, some, per_row(scores[some], count))
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
    scores: Tensor,
    sparsity: float = 0.5,
    pattern: str | Pattern | None = None,
    per: str = "row",
    backend: str = "auto",
) -> Tensor:
    """Bool mask [rows, n], True where the weight goes: ``W.masked_fill(mask, 0)`` prunes (and leaves +0.0).

    scores: [rows, n] float; small scores go first, among equal ones the earliest in row-major order. Exactly
    floor(sparsity · rows · n) go in the matrix. They are chosen in all of it (``per="matrix"``, magnitude pruning) or
    within each row (``per="row"``, as Wanda compares): then floor(sparsity · n) go in each, and in as many rows as make
    up the rest, at even distances, one more. No score is compared with another row's to choose those rows. With a
    pattern N:M, exactly M − N go in each group and sparsity is not used.

    ``backend`` as in `rac_kernels.backends.choose`: Triton's kernels choose in rows and in the matrix, CUDA's in the
    matrix; patterns and fp64 are the reference's work. On a GPU the check for NaN waits for the device, the selection
    does not; while a CUDA graph is captured nothing is checked.

    Raises ValueError for NaN scores, sparsity outside [0, 1] or columns not in whole groups of M.
    """
    check_sparsity(sparsity)
    if per not in ("row", "matrix"):
        raise ValueError(f"per must be 'row' or 'matrix', not {per!r}")
    rows, n = scores.shape
    keep, group = parse_pattern(pattern) or (0, 0)
    if group:
        check_pattern_fits((keep, group), n)
    fits = not group and _fits(scores)
    chosen = choose(backend, scores.device, triton=fits, cuda=fits and per == "matrix")
    return _mask_op(scores, zeros_of(sparsity, rows * n), per == "row", keep, group, chosen)


@torch.library.custom_op("rac::mask_by_score", mutates_args=())
def _mask_op(scores: Tensor, k: int, per_row: bool, keep: int, group: int, backend: str) -> Tensor:
    """group = 0: k go, chosen within each row or in all; else group - keep of each group."""
    if not gpu.capturing() and scores.numel() and scores.amax().isnan():
        raise ValueError("scores contain NaN")
    if group:
        return smallest_per_group(scores, (keep, group))
    on_gpu = backend in ("triton", "cuda")
    scores = scores.float().contiguous() if on_gpu else scores
    if per_row:
        return _spread_over_rows(scores, k, _mark_rows if on_gpu else smallest_per_row)
    return _mark(scores, k, backend) if on_gpu else smallest(scores, k, backend)


@_mask_op.register_fake
def _(scores: Tensor, k: int, per_row: bool, keep: int, group: int, backend: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


# Selection on a GPU: radix on keys, which are in the floats' order. Three counts of 11, 11 and 10 bits, then the ties;
# nothing waits for the host, and sums of integers come out the same in any order.
BINS = 2048

LEVELS = 3

COUNTED = 2048  # scores a program counts at a time

WARPS = 8  # four spill with Triton before 3.9

PROGRAM_SCORES = 16 * COUNTED


@gpu.jit()
def key_of(score):  # type: ignore[no-untyped-def]
    """Signed integers in the order of the fp32 that they stand for; -0 is 0, NaN of either sign is largest."""
    bits = score.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -size, size)
    return tl.where(size > 0x7F800000, 0x7FFFFFFF, key)


@gpu.jit()
def score_of(key):  # type: ignore[no-untyped-def]
    """The score that a key stands for."""
    return tl.where(key < 0, -key | -0x80000000, key).to(tl.float32, bitcast=True)


@gpu.jit()
def find_digit(count, k, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bin that the k-th smallest falls into, what k is among the bin's own, and how many these are."""
    bins = tl.arange(0, BINS)
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
    bins = tl.arange(0, BINS)
    prefix = 0
    if LEVEL > 0:
        digit, k, _equal = find_digit(tl.load(own + bins), k, BINS)
        prefix = digit - 1024
    if LEVEL > 1:
        digit, k, _equal = find_digit(tl.load(own + BINS + bins), k, BINS)
        prefix = prefix * 2048 + digit
    total = tl.zeros((BINS,), tl.int32)
    begin = tl.program_id(0).to(tl.int64) * (STEP * STEPS)
    for step in range(STEPS):
        i = begin + step * STEP + tl.arange(0, STEP)
        key = key_of(tl.load(scores + first + i, mask=i < count, other=0.0))
        if LEVEL == 0:
            total += tl.histogram((key >> 21) + 1024, BINS, mask=i < count)
        elif LEVEL == 1:
            total += tl.histogram((key >> 10) & 2047, BINS, mask=(i < count) & (key >> 21 == prefix))
        else:
            total += tl.histogram(key & 1023, BINS, mask=(i < count) & (key >> 10 == prefix))
    tl.atomic_add(own + LEVEL * BINS + bins, total, mask=total > 0, sem="relaxed")


@gpu.jit()
def resolve_kernel(scores, groups, state, thresholds, last, BINS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The group's threshold and the position of the last score equal to it that goes; the counts become zero again."""
    group = tl.program_id(0)
    first = tl.load(groups + 3 * group)
    count = tl.load(groups + 3 * group + 1)
    wanted = tl.load(groups + 3 * group + 2).to(tl.int32)
    own = state + group * 3 * BINS
    bins = tl.arange(0, BINS)
    high, k, _equal = find_digit(tl.load(own + bins), wanted, BINS)
    middle, k, _equal = find_digit(tl.load(own + BINS + bins), k, BINS)
    low, k, equal = find_digit(tl.load(own + 2 * BINS + bins), k, BINS)
    key = ((high - 1024) << 21) | (middle << 10) | low
    at = count - 1
    if k < equal:
        # More scores than may go equal the threshold: look for the k-th of them.
        found = 0
        begin = tl.zeros((), tl.int64)
        while found < k:
            i = begin + tl.arange(0, STEP)
            inside = i < count
            same = inside & (key_of(tl.load(scores + first + i, mask=inside, other=0.0)) == key)
            rank = found + tl.cumsum(same.to(tl.int32), 0)
            at = begin + tl.sum(tl.where(same & (rank == k), tl.arange(0, STEP), 0), 0)
            found += tl.sum(same.to(tl.int32), 0)
            begin += STEP
    tl.store(thresholds + group, tl.where(wanted > 0, score_of(key), float("-inf")))
    tl.store(last + group, tl.where(wanted > 0, at, -1))
    tl.debug_barrier()
    for level in range(3):
        tl.store(own + level * BINS + bins, tl.zeros((BINS,), tl.int32))


@gpu.jit("count")
def mark_kernel(scores, thresholds, last, mask, count, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """mask: what goes of the one group that was selected from."""
    i = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    key = key_of(tl.load(scores + i, mask=i < count, other=0.0))
    bound = key_of(tl.load(thresholds))
    tl.store(mask + i, (key < bound) | ((key == bound) & (i <= tl.load(last))), mask=i < count)


@gpu.jit("n", "k")
def mark_rows_kernel(scores, mask, n, k, BINS: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """mask: the k smallest scores of a row of n, a program a row. Four counts of 8 bits, each in its registers."""
    scores += tl.program_id(0).to(tl.int64) * n
    mask += tl.program_id(0).to(tl.int64) * n
    inside = tl.arange(0, STEP)
    bound = 0
    for level in tl.static_range(4):
        total = tl.zeros((BINS,), tl.int32)
        for first in range(0, n, STEP):
            i = first + inside
            key = key_of(tl.load(scores + i, mask=i < n, other=0.0)) >> (24 - 8 * level)
            if level == 0:
                total += tl.histogram(key + 128, BINS, mask=i < n)
            else:
                total += tl.histogram(key & 255, BINS, mask=(i < n) & (key >> 8 == bound))
        digit, k, _equal = find_digit(total, k, BINS)
        bound = digit - 128 if level == 0 else bound * 256 + digit
    found = 0
    for first in range(0, n, STEP):
        i = first + inside
        key = key_of(tl.load(scores + i, mask=i < n, other=0.0))
        same = (key == bound) & (i < n)
        rank = found + tl.cumsum(same.to(tl.int32), 0)
        tl.store(mask + i, (key < bound) | (same & (rank <= k)), mask=i < n)
        found += tl.sum(same.to(tl.int32), 0)


MARKED = 1024  # scores a program marks at a time

ROW_BINS = 256


def _mark(scores: Tensor, k: int, backend: str) -> Tensor:
    """`smallest` of contiguous fp32 scores on a GPU."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    count = scores.numel()
    if count:
        selection = Selection(1, scores.device, backend)
        selection.run(scores, [count], [k])
        with torch.cuda.device_of(scores):
            mark_kernel[(-(-count // MARKED),)](
                scores, selection.thresholds, selection.last, mask, count, STEP=MARKED, num_warps=4
            )
    return mask


def _mark_rows(scores: Tensor, k: int) -> Tensor:
    """`smallest_per_row` of contiguous fp32 scores on a GPU."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if scores.numel():
        with torch.cuda.device_of(scores):
            mark_rows_kernel[(len(scores),)](scores, mask, scores.shape[1], k, BINS=ROW_BINS, STEP=MARKED, num_warps=4)
    return mask


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
        """scores: fp32, the groups' one after the other, `counts` elements each; NaN counts as largest. What goes of
        group g, the first ks[g] in the order of score and position, is < thresholds[g], or == it at a position within
        the group <= last[g]."""
        if self._cuda:
            cuda.select_thresholds(scores, counts, ks, self._state, (self.thresholds, self.last))
            return
        table = _group_table(tuple(counts), tuple(ks), scores.device)
        grid = (max(-(-max(counts) // PROGRAM_SCORES), 1), len(counts))
        found = (self.thresholds, self.last)
        with torch.cuda.device_of(scores):
            for level in range(LEVELS):
                fixed = {"LEVEL": level, "BINS": BINS, "STEP": COUNTED, "STEPS": PROGRAM_SCORES // COUNTED}
                count_kernel[grid](scores, table, self._state, **fixed, num_warps=WARPS)
            resolve_kernel[(len(counts),)](scores, table, self._state, *found, BINS=BINS, STEP=COUNTED, num_warps=WARPS)


def limit(count: int) -> Limit:
    """A comparison for each of so many fp32 scores, which are read."""
    return Limit(float(count), 4.0 * count, "fp32")


def workspace(count: int, per: str = "row") -> int:
    """Bytes that `mask_by_score` and what makes its scores take, of `count` weights in all."""
    return (16 if per == "row" else 10) * count
