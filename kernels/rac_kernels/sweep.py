"""The left-looking SparseGPT sweep: from (W, U) to the pruned Q in one pass over the columns.

With H + λI = U Uᵀ and D = W − Q, the weights that the published loop has when it comes to column j are

    w_j = W_j + (Σ_{i<j} D_i U_ij) / U_jj,

so neither U⁻¹ nor a second copy of W is needed: each block of columns takes one product with all finished columns
(rows · n² FLOP in all), and within the block the same recurrence is walked column by column. A weight's score is
|w_j| U_jj, the square root of SparseGPT's w² / [R_jj]² with R = U⁻¹: the same order without squares that underflow.

Reference: Frantar, Alistarh, "SparseGPT" (arXiv 2301.00774). Masks and weights are those of its loop, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rac_kernels import native
from rac_kernels.backend import choose
from rac_kernels.pattern import Pattern, check_pattern_fits, check_sparsity, parse_pattern
from rac_kernels.select import smallest, smallest_per_group


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
    return _sweep_op(W, U, dead, sparsity, keep, group, block_size, groups, choose(backend, W.device))


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
    """keep = group = 0 is unstructured."""
    run = _native if backend == "native" and U.dtype == torch.float32 else _reference
    return run(W, U, dead, sparsity, keep, group, block_size, row_groups)


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


def _not_finite(W: Tensor) -> ValueError:
    return ValueError(f"W {tuple(W.shape)} holds NaN or infinities")


def _native(
    W: Tensor,
    U: Tensor,
    dead: Tensor | None,
    sparsity: float,
    keep: int,
    group: int,
    block_size: int,
    row_groups: Sequence[int],
) -> Tensor:
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
        sparsity,
        keep,
        group,
        block_size,
        list(row_groups),
        native.threads(),
    )
    if ended == native.NOT_FINITE:
        raise _not_finite(W)
    return Q


def _reference(
    W: Tensor,
    U: Tensor,
    dead: Tensor | None,
    sparsity: float,
    keep: int,
    group: int,
    block_size: int,
    row_groups: Sequence[int],
) -> Tensor:
    """The sweep in plain torch, in U's dtype: with an fp64 U it is the published loop's exact counterpart."""
    if not W.isfinite().all():
        raise _not_finite(W)
    n = W.shape[1]
    D = W.to(U.dtype, copy=True)  # becomes W − Q, block by block
    if dead is not None:
        D[:, dead] = 0
    Q = torch.empty_like(D)
    for lo in range(0, n, block_size):
        hi = min(lo + block_size, n)
        corner, scale, block = U[lo:hi, lo:hi], U.diagonal()[lo:hi], D[:, lo:hi]
        pull = D[:, :lo] @ U[:lo, lo:hi]  # D U of the columns before, in this block's
        prune = torch.zeros_like(pull, dtype=torch.bool)
        if not group:
            scores = _scores(block, pull, corner)
            for some, mask in zip(scores.split(row_groups), prune.split(row_groups), strict=True):
                mask.copy_(smallest(some, int(sparsity * some.numel())))
        for j in range(hi - lo):
            if group and j % group == 0:
                now = slice(j, j + group)
                scores = _scores(block[:, now], pull[:, now], corner[now, now])
                prune[:, now] = smallest_per_group(scores, (keep, group))
            d = block[:, j]
            q = (d + pull[:, j] / scale[j]).masked_fill_(prune[:, j], 0) + 0.0  # −0.0 + 0.0 = +0.0
            Q[:, lo + j] = q
            d -= q
            pull[:, j + 1 :].addr_(d, corner[j, j + 1 :])
    return Q


def _scores(W: Tensor, pull: Tensor, U: Tensor) -> Tensor:
    """|w| U_jj of the weights as they are if none of these columns' goes."""
    w = W + torch.linalg.solve_triangular(U, pull, upper=True, left=False)
    return w.abs() * U.diagonal()
