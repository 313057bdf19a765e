"""Squared column norms, s_j += Σ_t w_t x_tj²: the diagonal of the Hessian, all that Wanda asks of the calibration.

Wanda scores a weight |W_ij| ‖x_j‖; the caller takes the root. One pass over X, bound by memory: on a GPU the tokens are
split so that there are programs enough to keep it busy, and their sums are added in fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels.backends import gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.hessian import check_tokens
from rac_kernels.ops.limits import Limit


def column_norm_accumulate_(s: Tensor, X: Tensor, weights: Tensor | None = None, backend: str = "auto") -> Tensor:
    """s += Σ_t weights_t X_t² in place; returns s.

    s: [n] fp32, contiguous. X: [tokens, n] bf16, fp16 or fp32 of any strides, on s's device. weights: [tokens], finite
    and at least 0 (checked on the CPU); None means 1 each; tokens of weight 0 are left out whatever they hold.

    The sums of one call are made in fp64, on a GPU those of short runs of tokens in fp32. Raises ValueError if shapes,
    dtypes or devices do not fit.
    """
    if s.ndim != 1 or s.dtype != torch.float32 or not s.is_contiguous():
        raise ValueError(f"s must be a contiguous fp32 vector, not {s.dtype} {list(s.shape)} of strides {s.stride()}")
    check_tokens(X, weights, s, "s", s.shape[0])
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    _accumulate(s, X, weights, choose(backend, s.device, triton=True))
    return s


@torch.library.custom_op("rac::column_norm_accumulate_", mutates_args=("s",))
def _accumulate(s: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    """s += Σ_t weights_t X_t² by one backend, the arguments having been checked."""
    if backend == "reference":
        column_norm_accumulate_reference(s, X, weights)
    elif backend == "triton":
        _triton(s, X, weights)
    else:
        _native(s, X, weights)


@_accumulate.register_fake
def _(s: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    return None


def column_norm_accumulate_reference(s: Tensor, X: Tensor, weights: Tensor | None = None) -> Tensor:
    """`column_norm_accumulate_` in plain torch, for any device."""
    squares = X.double().square_()
    if weights is not None:
        w = weights.double()[:, None]
        squares = torch.where(w == 0, 0, squares * w)
    return s.copy_(s + squares.sum(0))


def _native(s: Tensor, X: Tensor, weights: Tensor | None) -> None:
    tokens, n = X.shape
    native.library().column_norm(
        s.data_ptr(),
        X.data_ptr(),
        native.DTYPES[X.dtype],
        tokens,
        n,
        *X.stride(),
        0 if weights is None else weights.data_ptr(),
        native.threads(),
    )


COLUMNS, STEP = 128, 16  # columns a program has, tokens it loads at a time

WAVES = 4  # programs in flight on a multiprocessor

LEAST = 256  # tokens that are worth a program


@gpu.jit("tokens", "n", "part_tokens")
def column_norm_kernel(  # type: ignore[no-untyped-def]
    partial,
    X,
    row_stride,
    column_stride,
    weights,
    tokens,
    n,
    part_tokens,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):
    """partial [parts, n]: each part of the tokens' Σ w x², program (column block, part)."""
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    first = part * part_tokens
    last = tl.minimum(tokens, first + part_tokens)
    row_stride = tl.cast(row_stride, tl.int64)
    t = tl.arange(0, STEP)
    x_at = X + (first + t)[:, None] * row_stride + j[None, :] * tl.cast(column_stride, tl.int64)
    sums = tl.zeros((STEP, COLUMNS), tl.float32)
    for step in range(first, last, STEP):
        live = step + t < last
        if WEIGHTED:
            w = tl.load(weights + step + t, mask=live, other=0.0)
            live = w != 0.0
        x = tl.load(x_at, mask=live[:, None] & (j < n)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            sums += w[:, None] * (x * x)
        else:
            sums += x * x
        x_at += STEP * row_stride
    tl.store(partial + tl.cast(part, tl.int64) * n + j, tl.sum(sums, 0), mask=j < n)


def _triton(s: Tensor, X: Tensor, weights: Tensor | None) -> None:
    tokens, n = X.shape
    if not tokens or not n:
        return
    blocks = -(-n // COLUMNS)
    parts = max(1, min(-(-WAVES * gpu.processors(s.device) // blocks), tokens // LEAST))
    partial = torch.empty(parts, n, dtype=torch.float32, device=s.device)
    with torch.cuda.device_of(s):
        column_norm_kernel[(blocks, parts)](
            partial,
            X,
            *X.stride(),
            s if weights is None else weights,
            tokens,
            n,
            -(-tokens // parts),
            WEIGHTED=weights is not None,
            COLUMNS=COLUMNS,
            STEP=STEP,
            num_warps=4,
            enable_fp_fusion=True,
        )
    s += partial.sum(0, dtype=torch.float64)


def limit(tokens: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Limit:
    """A square and an addition for each element of X [tokens, n], which is read."""
    return Limit(2.0 * tokens * n, float(tokens * n * dtype.itemsize), "fp32")
