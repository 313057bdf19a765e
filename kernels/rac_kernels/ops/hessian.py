"""The Hessian of a layer's squared error: H += Xᵀ diag(w) X, the upper triangle only.

With X [tokens, n] the inputs that a linear layer saw, ‖X Wᵀ − X Qᵀ‖² = tr((W − Q) H (W − Q)ᵀ) for H = Xᵀ X, so H is all
that a solver needs to know of the calibration tokens. A weight w_t counts token t that often; the solvers' damping is
relative to H's diagonal, so H is a sum and is never rescaled.

H is symmetric: n(n + 1) FLOP a token instead of 2n². Products of two bf16 or fp16 numbers are exact in fp32, so tokens
are never copied to fp32 in memory, and with sums in fp32 only their order differs from the plain way. Weights other
than 0 and 1 are applied in fp32, on the CPU as √w to both factors; tokens of weight 0 are left out whatever they hold.

On a GPU each program sums one square tile of the triangle over all tokens and then adds what H held. Tiles go out row
band by row band, so that those in flight at one time share their columns of X in the second-level cache. The tiles that
do not fill a last wave are split over the tokens: their parts are stored apart and added by a second kernel in fixed
order, so that results repeat bit for bit. Tensor cores cut off what they add, which would bias long sums of squares, so
a run of tokens is summed there and the runs in ordinary registers. fp32 tokens are multiplied as three TF32 products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rac_kernels.backends import gpu, native
from rac_kernels.backends.dispatch import choose
from rac_kernels.backends.gpu import tl
from rac_kernels.ops.limits import PRODUCT_PEAKS, Limit

_SIDE = 2048  # rows of H that the reference updates at a time


def hessian_accumulate_(H: Tensor, X: Tensor, weights: Tensor | None = None, backend: str = "auto") -> Tensor:
    """H += Xᵀ diag(weights) X in place, in the upper triangle including the diagonal; returns H.

    H: [n, n] fp32, contiguous rows; what lies below the diagonal is neither read nor written. X: [tokens, n] bf16, fp16
    or fp32 of any strides, on H's device. weights: [tokens], finite and at least 0 (checked on the CPU; on a GPU the
    Triton kernel counts a negative weight as it is, and the reference, which takes its root, gives NaN); None means 1
    each. ``backend`` as in `rac_kernels.backends.choose`.

    Errors against fp64 are those of an fp32 matrix product of the same tokens. Raises ValueError if shapes, dtypes or
    devices do not fit.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.dtype != torch.float32:
        raise ValueError(f"H must be a square fp32 matrix, not {H.dtype} {list(H.shape)}")
    if H.shape[0] > 1 and H.stride(1) != 1:
        raise ValueError(f"H must have contiguous rows; its strides are {H.stride()}")
    check_tokens(X, weights, H, "H", H.shape[0])
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    _accumulate(H, X, weights, choose(backend, H.device, triton=True))
    return H


def check_tokens(X: Tensor, weights: Tensor | None, target: Tensor, name: str, n: int) -> None:
    """Raise ValueError unless tokens X [tokens, n] and their weights can be counted into `target`, called `name`."""
    if X.ndim != 2 or X.shape[1] != n:
        raise ValueError(f"X must be [tokens, {n}] to fit {name} {list(target.shape)}, not {list(X.shape)}")
    if X.dtype not in native.DTYPES:
        raise ValueError(f"X must be bf16, fp16 or fp32, not {X.dtype}")
    if X.device != target.device:
        raise ValueError(f"X is on {X.device}, {name} on {target.device}")
    if weights is None:
        return
    if weights.shape != X.shape[:1]:
        raise ValueError(f"weights must be [{X.shape[0]}], one a token, not {list(weights.shape)}")
    if weights.device != X.device:
        raise ValueError(f"weights are on {weights.device}, X on {X.device}")
    if weights.device.type == "cpu" and not ((weights >= 0) & (weights < torch.inf)).all():
        raise ValueError("weights must be finite and at least 0")


@torch.library.custom_op("rac::hessian_accumulate_", mutates_args=("H",))
def _accumulate(H: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    """H += Xᵀ diag(weights) X by one backend, the arguments having been checked."""
    if backend == "reference":
        hessian_accumulate_reference(H, X, weights)
    elif backend == "triton":
        _triton(H, X, weights)
    else:
        _native(H, X, weights)


@_accumulate.register_fake
def _(H: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    return None


def hessian_accumulate_reference(H: Tensor, X: Tensor, weights: Tensor | None = None) -> Tensor:
    """`hessian_accumulate_` in plain torch, for any device, H of any floating dtype: the sums are made in it."""
    x = X.to(H.dtype)
    if weights is not None:
        w = weights.to(H.dtype)[:, None]
        x = torch.where(w == 0, 0, x * w.sqrt())
    for lo in range(0, H.shape[0], _SIDE):
        product = x[:, lo : lo + _SIDE].T @ x[:, lo:]
        H[lo : lo + _SIDE, lo:] += product.triu_()
    return H


def _native(H: Tensor, X: Tensor, weights: Tensor | None) -> None:
    tokens, n = X.shape
    native.library().hessian(
        H.data_ptr(),
        H.stride(0),
        X.data_ptr(),
        native.DTYPES[X.dtype],
        tokens,
        n,
        *X.stride(),
        0 if weights is None else weights.data_ptr(),
        native.threads(),
    )


@gpu.jit()
def triangle_tile(index, side, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Row and column of the index-th tile of a triangle `side` tiles wide, in bands of GROUP rows.

    Within a band the tiles go column by column. The roots are exact enough for sides up to 2048, give or take one.
    """
    edge = side + 0.5
    row = (edge - tl.sqrt(edge * edge - 2.0 * index)).to(tl.int32)  # as if the tiles went row by row
    row -= (row * side - row * (row - 1) // 2 > index).to(tl.int32)
    row += ((row + 1) * side - (row + 1) * row // 2 <= index).to(tl.int32)
    top = row // GROUP * GROUP
    height = tl.minimum(GROUP, side - top)
    index -= top * side - top * (top - 1) // 2
    # The band begins with a triangle of its own, column c of which has c + 1 tiles; full columns follow.
    column = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    column -= (column * (column + 1) // 2 > index).to(tl.int32)
    column += ((column + 1) * (column + 2) // 2 <= index).to(tl.int32)
    corner = height * (height + 1) // 2
    rest = index - corner
    row = top + tl.where(rest < 0, index - column * (column + 1) // 2, rest % height)
    return row, top + tl.where(rest < 0, column, height + rest // height)


@gpu.jit("tokens", "n", "side", "whole", "parts", "part_tokens")
def hessian_kernel(  # type: ignore[no-untyped-def]
    H,
    h_stride,
    X,
    row_stride,
    width,
    weights,
    partial,
    tokens,
    n,
    side,
    whole,
    parts,
    part_tokens,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    RUN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Programs 0 .. whole - 1 add a tile each to H; after them, `parts` programs a tile store their sums in `partial`.

    X [tokens, width] has contiguous rows, and zeros from column n on; RUN is a multiple of STEP.
    """
    program = tl.program_id(0)
    shared = program - whole
    tile = program if shared < 0 else whole + shared // parts
    first = 0 if shared < 0 else shared % parts * part_tokens
    last = tokens if shared < 0 else tl.minimum(tokens, first + part_tokens)
    row, column = triangle_tile(tile, side, GROUP)
    inside = tl.arange(0, BLOCK)
    i = row * BLOCK + inside
    j = column * BLOCK + inside
    t = tl.arange(0, STEP)
    row_stride = tl.cast(row_stride, tl.int64)
    left = X + (first + t)[:, None] * row_stride + i[None, :]
    right = X + (first + t)[:, None] * row_stride + j[None, :]
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(first, last, STEP):
        live = step + t < last
        if WEIGHTED:
            w = tl.load(weights + step + t, mask=live, other=0.0)
            live = w != 0.0
        a = tl.load(left, mask=live[:, None] & (i < width)[None, :], other=0.0)
        b = tl.load(right, mask=live[:, None] & (j < width)[None, :], other=0.0)
        if WEIGHTED:
            a = a.to(tl.float32)
            b = b.to(tl.float32) * w[:, None]
        sums = tl.dot(tl.trans(a), b, sums, input_precision="tf32x3")
        left += STEP * row_stride
        right += STEP * row_stride
        if (step - first) % RUN == RUN - STEP:
            total += sums
            sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    total += sums
    if shared < 0:
        target = H + i[:, None] * tl.cast(h_stride, tl.int64) + j[None, :]
        upper = (i[:, None] <= j[None, :]) & (j < n)[None, :]
        tl.store(target, tl.load(target, mask=upper) + total, mask=upper)
    else:
        own = partial + tl.cast(shared, tl.int64) * (BLOCK * BLOCK)
        tl.store(own + inside[:, None] * BLOCK + inside[None, :], total)


@gpu.jit("n", "side", "whole", "parts")
def add_parts_kernel(  # type: ignore[no-untyped-def]
    H,
    h_stride,
    partial,
    n,
    side,
    whole,
    parts,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Add the parts of one of the tiles from number `whole` on to H, ROWS of its rows a program."""
    shared = tl.program_id(0)
    row, column = triangle_tile(whole + shared, side, GROUP)
    down = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    across = tl.arange(0, BLOCK)
    own = partial + tl.cast(shared, tl.int64) * parts * (BLOCK * BLOCK) + down[:, None] * BLOCK + across[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for _part in range(parts):
        total += tl.load(own)
        own += BLOCK * BLOCK
    i = row * BLOCK + down
    j = column * BLOCK + across
    target = H + i[:, None] * tl.cast(h_stride, tl.int64) + j[None, :]
    upper = (i[:, None] <= j[None, :]) & (j < n)[None, :]
    tl.store(target, tl.load(target, mask=upper) + total, mask=upper)


class Config(NamedTuple):
    """The settings that `hessian_kernel` is compiled with, and how many of its programs a multiprocessor holds."""

    block: int
    step: int
    run: int
    warps: int
    stages: int
    resident: int


GROUP = 8  # rows of tiles in a band

PART_ROWS = 16  # rows of a tile that a program of `add_parts_kernel` adds

ALIGNED = 16  # Triton loads whole vectors where sizes, strides and addresses in bytes are multiples of this


def config(dtype: torch.dtype, weighted: bool, capability: int) -> Config:
    """16-bit tokens go to the tensor cores as they are; fp32 and weighted ones need more registers for each product.

    From capability 12.0 on longer steps would spill registers.
    """
    if dtype == torch.float32 or weighted:
        return Config(block=64, step=16, run=1024, warps=4, stages=4, resident=2)
    return Config(block=128, step=32 if capability >= 120 else 64, run=1024, warps=8, stages=4, resident=1)


def split(tokens: int, tiles: int, slots: int) -> tuple[int, int]:
    """Count the tiles that run whole, and the parts into which each of the others is split.

    `slots` programs run at a time. Whole waves run whole; the rest is split so that it ends soonest, a part costing
    some 512 tokens' worth of time to be stored and added, and so that the parts take no more memory than four waves.
    """
    whole = tiles // slots * slots
    rest = tiles - whole
    if not rest:
        return tiles, 1
    most = max(1, min(4 * slots // rest, tokens // 512))
    parts = min(range(1, most + 1), key=lambda parts: -(-rest * parts // slots) * (tokens / parts + 512 * (parts > 1)))
    return (whole, parts) if parts > 1 else (tiles, 1)


class Layout(NamedTuple):
    """The work of a launch: tiles of the triangle, and the parts of those that are split over the tokens."""

    side: int
    """Tiles along a side of H."""
    whole: int
    """Tiles that a program sums over all tokens."""
    shared: int
    """Tiles whose sums are made in parts."""
    parts: int
    part_tokens: int
    """Tokens of a part: whole steps."""

    @property
    def programs(self) -> int:
        return self.whole + self.shared * self.parts


def layout(tokens: int, n: int, chosen: Config, processors: int) -> Layout:
    """Lay out X [tokens, n] for a GPU of so many multiprocessors."""
    side = -(-n // chosen.block)
    tiles = side * (side + 1) // 2
    whole, parts = split(tokens, tiles, processors * chosen.resident)
    return Layout(side, whole, tiles - whole, parts, -(-tokens // (parts * chosen.step)) * chosen.step)


def _triton(H: Tensor, X: Tensor, weights: Tensor | None) -> None:
    tokens, n = X.shape
    if not tokens or not n:
        return
    chosen = config(X.dtype, weights is not None, gpu.capability(H.device))
    work = layout(tokens, n, chosen, gpu.processors(H.device))
    partial = torch.empty(work.shared * work.parts * chosen.block**2, dtype=torch.float32, device=H.device)
    X = aligned(X)
    with torch.cuda.device_of(H):
        hessian_kernel[(work.programs,)](
            H,
            H.stride(0),
            X,
            X.stride(0),
            X.shape[1],
            H if weights is None else weights,
            partial,
            tokens,
            n,
            work.side,
            work.whole,
            work.parts,
            work.part_tokens,
            WEIGHTED=weights is not None,
            BLOCK=chosen.block,
            STEP=chosen.step,
            RUN=chosen.run,
            GROUP=GROUP,
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            enable_fp_fusion=True,
        )
        if work.shared:
            add_parts_kernel[(work.shared, chosen.block // PART_ROWS)](
                H,
                H.stride(0),
                partial,
                n,
                work.side,
                work.whole,
                work.parts,
                BLOCK=chosen.block,
                ROWS=PART_ROWS,
                GROUP=GROUP,
                enable_fp_fusion=True,
            )


def aligned(X: Tensor) -> Tensor:
    """X itself if its rows can be loaded in whole vectors, else a copy that can, with zeros to the right."""
    tokens, n = X.shape
    if X.stride(1) == 1 and not (n % ALIGNED or X.stride(0) % ALIGNED or X.data_ptr() % ALIGNED):
        return X
    copy = X.new_zeros(tokens, -(-n // ALIGNED) * ALIGNED)
    copy[:, :n] = X
    return copy


def limit(tokens: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Limit:
    """One triangle of XᵀX, the diagonal included: X [tokens, n] read, the fp32 triangle read and written."""
    triangle = n * (n + 1) / 2
    return Limit(2 * tokens * triangle, tokens * n * dtype.itemsize + 8 * triangle, PRODUCT_PEAKS[dtype])


# The CPU packs tokens into panels (csrc/cpu/hessian.cpp): so many bytes at a time, or one run's where that is more.
PACKED_BYTES = 8 << 20

PACKED_RUN = 1024  # bytes of a run, a column


def workspace(tokens: int, n: int, device: torch.device) -> int:
    """Bytes that `hessian_accumulate_` takes for X [tokens, n] beside X and H."""
    return 0 if device.type == "cuda" else min(max(PACKED_BYTES, PACKED_RUN * n), 4 * n * tokens)
