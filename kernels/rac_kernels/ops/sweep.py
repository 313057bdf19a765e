"""The left-looking SparseGPT sweep: from (W, U) to the pruned Q in one pass over the columns.

With H + λI = U Uᵀ and D = W − Q, the weights that the published loop has when it comes to column j are

    w_j = W_j + (Σ_{i<j} D_i U_ij) / U_jj,

so neither U⁻¹ nor a second copy of W is needed: each block of columns takes one product with all finished columns
(rows · n² FLOP in all), and within the block the same recurrence is walked column by column. A weight's score is
|w_j| U_jj, the square root of SparseGPT's w² / [R_jj]² with R = U⁻¹: the same order without squares that underflow.

Reference: Frantar, Alistarh, "SparseGPT" (arXiv 2301.00774). Masks and weights are those of its loop, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rac_kernels.backends import gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.limits import Limit
from rac_kernels.ops.pattern import Pattern, check_pattern_fits, check_sparsity, parse_pattern, zeros_of
from rac_kernels.ops.product import COLUMNS, invert, product
from rac_kernels.ops.select import Selection, smallest, smallest_per_group


def sweep(
    W: Tensor,
    U: Tensor,
    sparsity: float = 0.5,
    pattern: str | Pattern | None = None,
    block_size: int = 128,
    dead: Tensor | None = None,
    row_groups: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """The pruned and corrected weights Q [rows, n], fp32, with exact +0.0 where pruned.

    W: [rows, n], any float dtype, finite; read, never written. U: [n, n] fp32 from ``factor_``; only its upper
    triangle is read. ``dead``: [n] bool from ``factor_``; those columns become zero.

    Unstructured: in each block of ``block_size`` columns, and within it in each of the ``row_groups`` (row counts
    that add up to rows; one group if None; stack q, k and v and give theirs), floor(sparsity · weights) weights go:
    those whose scores are lowest when the sweep reaches the block, among equal scores the earliest in row-major order.

    ``pattern`` "N:M": in each group of M consecutive columns of a row N weights stay, chosen when the sweep reaches
    the group, among equal scores the rightmost; sparsity and row_groups have no part in it. Blocks are cut to whole
    groups.

    Precision: the arithmetic is fp32, but on a CPU with AVX512-BF16 and no AMX row groups of at least 2¹⁹ weights take
    part of the product D U with both factors rounded to bf16 and sums in fp32. D is what was really done, so columns to
    come make up for an error E in a product, which adds ‖E‖² to the objective ‖D U‖² and no more. Rounding to nearest
    makes E²_ij at most 2⁻¹⁵/3 · Σ_k D²_ik U²_kj on average, and 256 finished columns at a time go through bf16 only
    while all of that, summed since the first column, stays below 1e-4 of the row group's objective so far. Such
    rounding also tips near ties between scores; what that does to the objective is chance, up or down, and averages out
    over rows.

    The Triton kernels take blocks of at most 128 columns; "auto" leaves larger ones on a GPU to the reference. They can
    be captured in a CUDA graph once the same call has been made: that compiles them, and copies to the device which row
    belongs to which group, to stay there for good. While a graph is captured W is not checked.

    Raises ValueError if n is not a multiple of M, if W holds NaN or infinities, or if shapes or numbers do not fit.
    """
    rows, n = W.shape
    check_sparsity(sparsity)
    keep, group = parse_pattern(pattern) or (0, 0)
    if block_size < 1:
        raise ValueError(f"block_size {block_size} must be at least 1")
    if group:
        check_pattern_fits((keep, group), n)
        block_size = max(block_size // group, 1) * group
    groups = [rows] if row_groups is None else list(row_groups)
    if sum(groups) != rows or any(count < 0 for count in groups):
        raise ValueError(f"row_groups {groups} must be counts that add up to {rows} rows")
    if not W.is_floating_point() or U.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"W must be floating point and U fp32, not {W.dtype} and {U.dtype}")
    if U.shape != (n, n) or U.device != W.device or (dead is not None and dead.shape != (n,)):
        raise ValueError(f"U must be [{n}, {n}] on {W.device} to fit W, dead [{n}], not {list(U.shape)} on {U.device}")
    kernels = block_size <= COLUMNS and U.dtype == torch.float32
    chosen = choose(backend, W.device, triton=kernels, cuda=kernels)
    return _sweep_op(W, U, dead, sparsity, keep, group, block_size, groups, chosen)


@torch.library.custom_op("rac::sweep", mutates_args=())
def _sweep_op(
    W: Tensor,
    U: Tensor,
    dead: Tensor | None,
    sparsity: float,
    keep: int,
    group: int,
    block_size: int,
    row_groups: Sequence[int],
    backend: str,
) -> Tensor:
    """The sweep by one backend, the arguments having been checked; keep = group = 0 is unstructured."""
    ways: dict[str, Callable[..., Tensor]] = {
        "native": _native,
        "triton": _triton,
        "cuda": partial(_triton, selection="cuda"),
    }
    run = ways.get(backend, _reference) if U.dtype == torch.float32 else _reference
    return run(W, U, dead, _Goal(sparsity, keep, group, block_size, tuple(row_groups)))


@_sweep_op.register_fake
def _(
    W: Tensor,
    U: Tensor,
    dead: Tensor | None,
    sparsity: float,
    keep: int,
    group: int,
    block_size: int,
    row_groups: Sequence[int],
    backend: str,
) -> Tensor:
    return W.new_empty(W.shape, dtype=U.dtype)


@dataclass(frozen=True)
class _Goal:
    """Which weights are to go, as the schema has it."""

    sparsity: float
    """The share that goes where `group` is 0, of each block and row group."""
    keep: int
    """Weights that stay of each `group` columns of a row; 0 with `group` 0."""
    group: int
    block_size: int
    """Columns a block: whole groups."""
    row_groups: tuple[int, ...]
    """Row counts."""


def _not_finite(W: Tensor) -> ValueError:
    return ValueError(f"W {tuple(W.shape)} holds NaN or infinities")


def _reference(W: Tensor, U: Tensor, dead: Tensor | None, goal: _Goal) -> Tensor:
    """The sweep in plain torch, in U's dtype: with an fp64 U it is the published loop's exact counterpart."""
    if not W.isfinite().all():
        raise _not_finite(W)
    n = W.shape[1]
    D = W.to(U.dtype, copy=True)  # becomes W − Q, block by block
    if dead is not None:
        D[:, dead] = 0
    Q = torch.empty_like(D)
    for lo in range(0, n, goal.block_size):
        hi = min(lo + goal.block_size, n)
        corner, scale, block = U[lo:hi, lo:hi], U.diagonal()[lo:hi], D[:, lo:hi]
        pull = D[:, :lo] @ U[:lo, lo:hi]  # D U of the columns before, in this block's
        prune = torch.zeros_like(pull, dtype=torch.bool)
        if not goal.group:
            scores = _scores(block, pull, corner)
            for some, mask in zip(scores.split(goal.row_groups), prune.split(goal.row_groups), strict=True):
                mask.copy_(smallest(some, zeros_of(goal.sparsity, some.numel())))
        for j in range(hi - lo):
            if goal.group and j % goal.group == 0:
                now = slice(j, j + goal.group)
                scores = _scores(block[:, now], pull[:, now], corner[now, now])
                prune[:, now] = smallest_per_group(scores, (goal.keep, goal.group))
            d = block[:, j]
            q = (d + pull[:, j] / scale[j]).masked_fill_(prune[:, j], 0) + 0.0  # −0.0 + 0.0 = +0.0
            Q[:, lo + j] = q
            d -= q
            pull[:, j + 1 :].addr_(d, corner[j, j + 1 :])
    return Q


def _native(W: Tensor, U: Tensor, dead: Tensor | None, goal: _Goal) -> Tensor:
    if W.dtype not in native.DTYPES:
        W = W.float()
    W = W if W.stride(-1) == 1 else W.contiguous()
    U = U if U.stride(-1) == 1 else U.contiguous()
    dead = None if dead is None else dead.contiguous()
    Q = W.new_empty(W.shape, dtype=torch.float32)
    ended = native.library().sweep(
        Q.data_ptr(),
        W.data_ptr(),
        native.DTYPES[W.dtype],
        W.shape[1],
        W.stride(0),
        U.data_ptr(),
        U.stride(0),
        0 if dead is None else dead.data_ptr(),
        goal.sparsity,
        goal.keep,
        goal.group,
        goal.block_size,
        list(goal.row_groups),
        native.threads(),
    )
    if ended == native.NOT_FINITE:
        raise _not_finite(W)
    return Q


def _scores(W: Tensor, pull: Tensor, U: Tensor) -> Tensor:
    """|w| U_jj of the weights as they are if none of these columns' goes."""
    w = W + torch.linalg.solve_triangular(U, pull, upper=True, left=False)
    return w.abs() * U.diagonal()


@gpu.jit()
def current_weights(  # type: ignore[no-untyped-def]
    W,
    scale,
    pulls,
    count,
    rows,
    inverse,
    first_row,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """W + (sum of pulls) Λ⁻¹ inverse: the block's weights as they are when the sweep comes to it."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    live = (first_row + i < rows)[:, None]
    pulls += first_row * COLUMNS
    moved = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, COLUMNS, STEP):
        k = first + tl.arange(0, STEP)
        pull = tl.zeros((ROWS, STEP), tl.float32)
        for part in range(count):
            own = pulls + tl.cast(part, tl.int64) * rows * COLUMNS
            pull += tl.load(own + i[:, None] * COLUMNS + k[None, :], mask=live, other=0.0)
        pull /= tl.load(scale + k, mask=k < width, other=1.0)[None, :]
        r = tl.load(inverse + k[:, None] * COLUMNS + j[None, :])
        moved = tl.dot(pull, r, moved, input_precision="tf32x3")
    return W + moved


@gpu.jit()
def walk_column(X, goes, inverse, column, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Takes this column's weights that go to exactly zero, and spreads the error over the columns to the right."""
    j = tl.arange(0, COLUMNS)
    w = tl.sum(tl.where(goes & (j == column)[None, :], X, 0.0), 1)
    return X - w[:, None] * tl.load(inverse + column * COLUMNS + j)[None, :]


@gpu.jit("rows", "width", "count")
def score_kernel(  # type: ignore[no-untyped-def]
    D,
    Q,
    scales,
    pulls,
    inverse,
    scores,
    rows,
    n,
    lo,
    width,
    count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Q[:, block] = the weights as they are now, scores [rows, width] = theirs. D[:, block] holds W."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    inside = (first_row + i < rows)[:, None] & (j < width)[None, :]
    D += first_row * n + lo
    Q += first_row * n + lo
    at = i[:, None] * n + j[None, :]
    W = tl.load(D + at, mask=inside, other=0.0)
    X = current_weights(W, scales + lo, pulls, count, rows, inverse, first_row, width, ROWS, COLUMNS, STEP)
    scale = tl.load(scales + lo + j, mask=j < width, other=0.0)
    tl.store(Q + at, X, mask=inside)
    scores += first_row * width
    tl.store(scores + i[:, None] * width + j[None, :], tl.abs(X) * scale[None, :], mask=inside)


@gpu.jit("rows", "width")
def threshold_kernel(  # type: ignore[no-untyped-def]
    D,
    Q,
    inverse,
    scores,
    thresholds,
    last,
    group_of_row,
    first_rows,
    rows,
    n,
    lo,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Walks the block; what scores less than its row group's threshold goes, or as much and comes no later than `last`.

    Q[:, block]: from the weights as they are to the pruned ones. D[:, block]: from W to W − Q.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    inside = (first_row + i < rows)[:, None] & (j < width)[None, :]
    D += first_row * n + lo
    Q += first_row * n + lo
    at = i[:, None] * n + j[None, :]
    scores += first_row * width
    score = tl.load(scores + i[:, None] * width + j[None, :], mask=inside, other=0.0)
    group = tl.load(group_of_row + first_row + i, mask=first_row + i < rows, other=0)
    threshold = tl.load(thresholds + group)[:, None]
    # The last position that goes, counted from the beginning of the row.
    still = tl.load(last + group) - (first_row + i - tl.load(first_rows + group)) * width
    still = tl.minimum(tl.maximum(still, -1), COLUMNS).to(tl.int32)
    goes = inside & ((score < threshold) | ((score == threshold) & (j[None, :] <= still[:, None])))
    X = tl.load(Q + at, mask=inside, other=0.0)
    for column in range(width):
        X = walk_column(X, goes, inverse, column, COLUMNS)
    tl.store(Q + at, X, mask=inside)
    tl.store(D + at, tl.load(D + at, mask=inside, other=0.0) - X, mask=inside)


@gpu.jit("rows", "width", "count")
def pattern_kernel(  # type: ignore[no-untyped-def]
    D,
    Q,
    scales,
    pulls,
    inverse,
    rows,
    n,
    lo,
    width,
    count,
    KEEP: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """Walks the block, choosing in each GROUP of columns as it comes. Q[:, block] is written, D[:, block] W → W − Q."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    inside = (first_row + i < rows)[:, None] & (j < width)[None, :]
    D += first_row * n + lo
    Q += first_row * n + lo
    at = i[:, None] * n + j[None, :]
    W = tl.load(D + at, mask=inside, other=0.0)
    X = current_weights(W, scales + lo, pulls, count, rows, inverse, first_row, width, ROWS, COLUMNS, STEP)
    scale = tl.load(scales + lo + j, mask=j < width, other=0.0)
    for first in range(0, width, GROUP):
        score = tl.abs(X) * scale[None, :]
        before = tl.zeros((ROWS, COLUMNS), tl.int32)  # how many of the group go before this one
        for column in range(first, first + GROUP):
            other = tl.sum(tl.where((j == column)[None, :], score, 0.0), 1)[:, None]
            before += ((other < score) | ((other == score) & (j > column)[None, :])).to(tl.int32)
        goes = (before < GROUP - KEEP) & ((j >= first) & (j < first + GROUP))[None, :]
        for column in range(first, first + GROUP):
            X = walk_column(X, goes, inverse, column, COLUMNS)
    tl.store(Q + at, X, mask=inside)
    tl.store(D + at, W - X, mask=inside)


STEP = 32

#: Rows that a program holds in registers, and its warps: where the block is multiplied, and where it is only walked.
TILE = {"ROWS": 32, "num_warps": 8}

WALK = {"ROWS": 16, "num_warps": 4}


@gpu.kept
def _row_table(row_groups: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Each row's group [rows] int32, each group's first row [groups] int64."""
    counts = torch.tensor(row_groups)
    groups = torch.arange(len(row_groups), dtype=torch.int32).repeat_interleave(counts)
    return groups.to(device), (counts.cumsum(0) - counts).to(device)


def _triton(W: Tensor, U: Tensor, dead: Tensor | None, goal: _Goal, selection: str = "triton") -> Tensor:
    """Nothing waits for the device but the check of W, which is left out while a CUDA graph is captured."""
    if not gpu.capturing() and not W.isfinite().all():
        raise _not_finite(W)
    rows, n = W.shape
    D = torch.empty(rows, n, dtype=torch.float32, device=W.device).copy_(W)  # becomes W − Q, block by block
    Q = torch.empty_like(D)
    if not D.numel():
        return Q
    if dead is not None:
        D.masked_fill_(dead, 0)
    U = U if U.stride(1) == 1 else U.contiguous()
    scales = U.diagonal().contiguous()
    blocks = -(-n // goal.block_size)
    inverses = torch.empty(blocks, COLUMNS, COLUMNS, dtype=torch.float32, device=W.device)
    tiles, walks = -(-rows // TILE["ROWS"]), -(-rows // WALK["ROWS"])
    fixed = {"COLUMNS": COLUMNS, "enable_fp_fusion": True}
    with torch.cuda.device_of(W):
        invert(U[None], inverses[None], goal.block_size, unit=True)
        if not goal.group:
            selected = Selection(len(goal.row_groups), W.device, selection)
            tables = _row_table(goal.row_groups, W.device)
            scores = torch.empty(rows * goal.block_size, dtype=torch.float32, device=W.device)
        for inverse, lo in zip(inverses, range(0, n, goal.block_size), strict=True):
            width = min(goal.block_size, n - lo)
            block = (rows, n, lo, width)
            pulls = product(D[None, :, :lo], U[None, :lo, lo : lo + width])[0]
            moved = (scales, pulls, inverse)
            if goal.group:
                pattern_kernel[(tiles,)](
                    D, Q, *moved, *block, len(pulls), KEEP=goal.keep, GROUP=goal.group, STEP=STEP, **TILE, **fixed
                )
                continue
            score_kernel[(tiles,)](D, Q, *moved, scores, *block, len(pulls), STEP=STEP, **TILE, **fixed)
            counts = [count * width for count in goal.row_groups]
            selected.run(scores, counts, [zeros_of(goal.sparsity, count) for count in counts])
            found = (selected.thresholds, selected.last)
            threshold_kernel[(walks,)](D, Q, inverse, scores, *found, *tables, *block, **WALK, **fixed)
    return Q


def limit(rows: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Limit:
    """Every column's error spread over the columns to its right: W [rows, n] read, Q written in fp32, the fp32 triangle
    of U read."""
    return Limit(float(rows * n * n), rows * n * (dtype.itemsize + 4) + 2.0 * n * (n + 1), "tf32x3")


def workspace(weights: int, device: torch.device) -> int:
    """Bytes that `sweep` holds of so many weights, the fp32 result included; more on a CPU, as was measured."""
    return (8 if device.type == "cuda" else 10) * weights
