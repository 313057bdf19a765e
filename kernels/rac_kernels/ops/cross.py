"""The product of two streams of tokens, C += Xᵀ diag(w) Y: what ties a pruned model's inputs to the dense one's.

To reconstruct what the dense model gave, min ‖X′ Ŵᵀ − X Wᵀ‖², a solver needs H = X′ᵀX′ (`rac_kernels.hessian`) and
C = X′ᵀ(X Wᵀ) or X′ᵀX. C is no symmetric matrix: 2nm FLOP a token, all of the rectangle. Otherwise as the Hessian:
products of bf16 and fp16 are exact in fp32, sums are made in fp32, C is a sum that is never rescaled, tokens of weight
0 are left out whatever they hold.

On a GPU each program sums one square tile of C over all tokens, or over a part of them where the tiles do not fill the
device: then the parts are stored apart and added by a second kernel in fixed order, so that results repeat bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels.backends import gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.hessian import Config, aligned, check_tokens, config
from rac_kernels.ops.limits import PRODUCT_PEAKS, Limit

_SIDE = 2048  # rows of C that the reference updates at a time


def cross_accumulate_(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None = None, backend: str = "auto") -> Tensor:
    """C += Xᵀ diag(weights) Y in place; returns C.

    C: [n, m] fp32, contiguous rows. X: [tokens, n] and Y: [tokens, m], both bf16, both fp16 or both fp32, of any
    strides, on C's device. weights: [tokens], finite and at least 0 (checked on the CPU; on a GPU a negative weight
    counts as it is); None means 1 each. ``backend`` as in `rac_kernels.backends.choose`.

    Errors against fp64 are those of an fp32 matrix product of the same tokens. Raises ValueError if shapes, dtypes or
    devices do not fit.
    """
    if C.ndim != 2 or C.dtype != torch.float32:
        raise ValueError(f"C must be an fp32 matrix, not {C.dtype} {list(C.shape)}")
    if C.shape[1] > 1 and C.stride(1) != 1:
        raise ValueError(f"C must have contiguous rows; its strides are {C.stride()}")
    check_tokens(X, weights, C, "C", C.shape[0])
    if Y.ndim != 2 or Y.shape != (X.shape[0], C.shape[1]) or Y.dtype != X.dtype or Y.device != X.device:
        wanted = f"{X.dtype} [{X.shape[0]}, {C.shape[1]}] on {X.device}"
        raise ValueError(f"Y must be {wanted} to fit X and C, not {Y.dtype} {list(Y.shape)} on {Y.device}")
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    _accumulate(C, X, Y, weights, choose(backend, C.device, triton=True))
    return C


@torch.library.custom_op("rac::cross_accumulate_", mutates_args=("C",))
def _accumulate(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None, backend: str) -> None:
    """C += Xᵀ diag(weights) Y by one backend, the arguments having been checked."""
    if backend == "reference":
        cross_accumulate_reference(C, X, Y, weights)
    elif backend == "triton":
        _triton(C, X, Y, weights)
    else:
        _native(C, X, Y, weights)


@_accumulate.register_fake
def _(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None, backend: str) -> None:
    return None


def cross_accumulate_reference(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None = None) -> Tensor:
    """`cross_accumulate_` in plain torch, for any device, C of any floating dtype: the sums are made in it."""
    y = Y.to(C.dtype)
    x = X.to(C.dtype)
    if weights is not None:
        w = weights.to(C.dtype)[:, None]
        x = torch.where(w == 0, 0, x * w)
        y = torch.where(w == 0, 0, y)
    for lo in range(0, C.shape[0], _SIDE):
        C[lo : lo + _SIDE] += x[:, lo : lo + _SIDE].T @ y
    return C


def _native(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None) -> None:
    tokens, n = X.shape
    native.library().cross(
        C.data_ptr(),
        C.stride(0),
        X.data_ptr(),
        Y.data_ptr(),
        native.DTYPES[X.dtype],
        tokens,
        n,
        Y.shape[1],
        *X.stride(),
        *Y.stride(),
        0 if weights is None else weights.data_ptr(),
        native.threads(),
    )


@gpu.jit()
def rectangle_tile(index, down, across, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of the index-th tile of a rectangle of down x across tiles, column by column in bands of rows."""
    band = index // (GROUP * across)
    top = band * GROUP
    height = tl.minimum(GROUP, down - top)
    index -= top * across
    return top + index % height, index // height


@gpu.jit("tokens", "n", "m", "down", "across", "parts", "part_tokens")
def cross_kernel(  # type: ignore[no-untyped-def]
    C,
    c_stride,
    X,
    x_stride,
    x_width,
    Y,
    y_stride,
    y_width,
    weights,
    partial,
    tokens,
    n,
    m,
    down,
    across,
    parts,
    part_tokens,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Adds a tile to C or, if there are `parts`, stores what one part of the tokens makes of it in `partial`.

    X [tokens, x_width] and Y [tokens, y_width] have contiguous rows; RUN is a multiple of STEP.
    """
    program = tl.program_id(0)
    tile = program // parts
    first = program % parts * part_tokens
    last = tl.minimum(tokens, first + part_tokens)
    row, column = rectangle_tile(tile, down, across, GROUP)
    inside = tl.arange(0, BLOCK)
    i = row * BLOCK + inside
    j = column * BLOCK + inside
    t = tl.arange(0, STEP)
    # 64 bits for where a program begins and steps to, 32 for what it holds in registers.
    left = X + tl.cast(first, tl.int64) * x_stride + row * BLOCK
    right = Y + tl.cast(first, tl.int64) * y_stride + column * BLOCK
    x_at = t[:, None] * x_stride + inside[None, :]
    y_at = t[:, None] * y_stride + inside[None, :]
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(first, last, STEP):
        live = step + t < last
        if WEIGHTED:
            w = tl.load(weights + step + t, mask=live, other=0.0)
            live = w != 0.0
        a = tl.load(left + x_at, mask=live[:, None] & (i < x_width)[None, :], other=0.0)
        b = tl.load(right + y_at, mask=live[:, None] & (j < y_width)[None, :], other=0.0)
        if WEIGHTED:
            a = a.to(tl.float32)
            b = b.to(tl.float32) * w[:, None]
        sums = tl.dot(tl.trans(a), b, sums, input_precision="tf32x3")
        left += STEP * tl.cast(x_stride, tl.int64)
        right += STEP * tl.cast(y_stride, tl.int64)
        if (step - first) % RUN == RUN - STEP:
            total += sums
            sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    total += sums
    if parts == 1:  # asked as the program runs: the compiler then keeps what follows out of the loop's registers
        target = C + tl.cast(row * BLOCK, tl.int64) * c_stride + column * BLOCK
        at = inside[:, None] * c_stride + inside[None, :]
        exists = (i < n)[:, None] & (j < m)[None, :]
        # No other program adds to this tile, so the sum is the same each time. Loaded, added and stored, C would take
        # as many registers as the sums, and Triton before 3.9 spills.
        tl.atomic_add(target + at, total, mask=exists, sem="relaxed")
    else:
        own = partial + tl.cast(program, tl.int64) * (BLOCK * BLOCK)
        tl.store(own + inside[:, None] * BLOCK + inside[None, :], total)


@gpu.jit("n", "m", "down", "across", "parts")
def add_parts_kernel(  # type: ignore[no-untyped-def]
    C, c_stride, partial, n, m, down, across, parts, BLOCK: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr
):
    """Adds the parts of a tile to C, ROWS of its rows a program."""
    tile = tl.program_id(0)
    row, column = rectangle_tile(tile, down, across, GROUP)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    own = partial + tl.cast(tile, tl.int64) * parts * (BLOCK * BLOCK) + rows[:, None] * BLOCK + columns[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _part in range(parts):
        total += tl.load(own)
        own += BLOCK * BLOCK
    i = row * BLOCK + rows
    j = column * BLOCK + columns
    target = C + i[:, None] * tl.cast(c_stride, tl.int64) + j[None, :]
    exists = (i < n)[:, None] & (j < m)[None, :]
    tl.store(target, tl.load(target, mask=exists) + total, mask=exists)


GROUP = 8  # rows of tiles in a band

PART_ROWS = 16  # rows of a tile that a program of `add_parts_kernel` adds


def split(tokens: int, tiles: int, slots: int) -> int:
    """Into how many parts the tokens are split, for `slots` programs at a time: so that the last of them ends soonest.

    A part costs some 512 tokens' worth of time to be stored and added. Two waves of tiles or more are not split, so the
    parts take no more memory than two waves of tiles do.
    """
    if tiles >= 2 * slots:
        return 1
    most = max(1, min(2 * slots // tiles, tokens // 512))
    return min(range(1, most + 1), key=lambda parts: -(-tiles * parts // slots) * (tokens / parts + 512 * (parts > 1)))


def _triton(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None) -> None:
    (tokens, n), m = X.shape, Y.shape[1]
    if not tokens or not n or not m:
        return
    chosen: Config = config(X.dtype, weights is not None, gpu.capability(C.device))
    down, across = -(-n // chosen.block), -(-m // chosen.block)
    tiles = down * across
    parts = split(tokens, tiles, gpu.processors(C.device) * chosen.resident)
    part_tokens = -(-tokens // (parts * chosen.step)) * chosen.step
    partial = C if parts == 1 else C.new_empty(tiles * parts * chosen.block**2)
    X, Y = aligned(X), aligned(Y)
    with torch.cuda.device_of(C):
        cross_kernel[(tiles * parts,)](
            C,
            C.stride(0),
            X,
            X.stride(0),
            X.shape[1],
            Y,
            Y.stride(0),
            Y.shape[1],
            C if weights is None else weights,
            partial,
            tokens,
            n,
            m,
            down,
            across,
            parts,
            part_tokens,
            WEIGHTED=weights is not None,
            BLOCK=chosen.block,
            STEP=chosen.step,
            RUN=chosen.run,
            GROUP=GROUP,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,
        )
        if parts > 1:
            add_parts_kernel[(tiles, chosen.block // PART_ROWS)](
                C,
                C.stride(0),
                partial,
                n,
                m,
                down,
                across,
                parts,
                BLOCK=chosen.block,
                ROWS=PART_ROWS,
                GROUP=GROUP,
                enable_fp_fusion=True,
            )


def limit(tokens: int, n: int, m: int, dtype: torch.dtype = torch.bfloat16) -> Limit:
    """All of XᵀY: X [tokens, n] and Y [tokens, m] read, the fp32 sum read and written."""
    return Limit(2.0 * tokens * n * m, tokens * (n + m) * dtype.itemsize + 8.0 * n * m, PRODUCT_PEAKS[dtype])
