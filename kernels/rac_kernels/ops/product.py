"""Steps that factor and sweep share on a GPU: the product that carries them, and the inverses of U's diagonal blocks.

Both take off a block of at most 128 columns what is done already: D[:, :lo] U[:lo, block] in the sweep, U[:hi, hi:]
U[block, hi:]ᵀ in the factor. So tall and narrow a product leaves most of a GPU idle unless its depth is cut as well;
the parts stay apart and whoever reads them adds them up, in order, so nothing depends on which program came first. That
also ends the chain of sums in the tensor cores, which truncate, after ``PART_DEPTH`` columns at most.

Products of fp32 are made of three of TF32 (tf32x3): errors as in fp32, at a third of TF32's speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels.backends import gpu
from rac_kernels.backends.gpu import tl

COLUMNS = 128  # a block's columns, padded

ROWS = 64  # rows of a product that a program makes

STEP = 16

WARPS = 4  # a tile of wgmma's; with 8 Triton turns the sums over within each step, on capability 9.0

WARPS_SPILLING = 8  # where 4 have too few registers

STAGES = 4

PROGRAMS = 528  # what fills a large GPU twice; a constant, so that results do not depend on the device

PART_DEPTH = 2048

INVERTED = 32  # columns of an inverse a program


@gpu.jit("rows", "depth", "columns", "part_depth")
def product_kernel(  # type: ignore[no-untyped-def]
    A,
    a_matrix,
    a_row,
    B,
    b_matrix,
    b_row,
    b_column,
    out,
    rows,
    depth,
    columns,
    part_depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out[m, p] = A[m, :, depths of part p] B[m, depths of part p, :]; A [m, rows, depth] has contiguous rows.

    WHOLE: depth is a multiple of STEP and columns is COLUMNS. Without their masks copies are of whole vectors.
    """
    part = tl.program_id(1)
    matrix = tl.program_id(2).to(tl.int64)
    A += matrix * a_matrix
    B += matrix * b_matrix
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, COLUMNS)
    begin = tl.multiple_of(part * part_depth, STEP)  # as `parts` cuts them, which the compiler cannot know
    k = begin + tl.arange(0, STEP)
    last = tl.minimum(depth, (part + 1) * part_depth)
    b_row = tl.cast(b_row, tl.int64)
    b_column = tl.cast(b_column, tl.int64)
    left = A + i[:, None] * tl.cast(a_row, tl.int64) + k[None, :]
    right = B + k[:, None] * b_row + j[None, :] * b_column
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, last, STEP):
        if WHOLE:
            a = tl.load(left, mask=(i < rows)[:, None], other=0.0)
            b = tl.load(right)
        else:
            live = first + tl.arange(0, STEP) < last
            a = tl.load(left, mask=(i < rows)[:, None] & live[None, :], other=0.0)
            b = tl.load(right, mask=live[:, None] & (j < columns)[None, :], other=0.0)
        sums = tl.dot(a, b, sums, input_precision="tf32x3")
        left += STEP
        right += STEP * b_row
    own = out + ((matrix * tl.num_programs(1) + part) * rows + i[:, None]) * COLUMNS + j[None, :]
    tl.store(own, sums, mask=(i < rows)[:, None])


def warps(transposed: bool, whole: bool, capability: int) -> int:
    """Warps of a program. `transposed`: B's columns are what is contiguous; `whole` as in the kernel."""
    spilling = transposed and not whole and not 90 <= capability < 120  # which have wgmma or tcgen05
    return WARPS_SPILLING if spilling else WARPS


def parts(tiles: int, depth: int) -> tuple[int, int]:
    """Into how many parts a product's depth is cut, and the depth of each, a multiple of STEP."""
    fill = -(-PROGRAMS // tiles)
    count = max(-(-depth // PART_DEPTH), min(fill, depth // 256), 1)
    each = -(-depth // (count * STEP)) * STEP
    return -(-depth // each), each


def product(A: Tensor, B: Tensor) -> Tensor:
    """A [matrices, rows, depth] B [matrices, depth, columns <= 128], both fp32, as a sum over the second dimension of
    the result [matrices, parts, rows, 128], of which the columns beyond B's are zero. Without depth there are no parts.

    How many parts does not depend on how many matrices, and so no matrix's result on which others are there.
    """
    matrices, rows, depth = A.shape
    tiles = -(-rows // ROWS)
    count, each = parts(tiles, depth) if rows and depth else (0, 0)
    whole = depth % STEP == 0 and B.shape[2] == COLUMNS
    out = torch.empty(matrices, count, rows, COLUMNS, dtype=torch.float32, device=A.device)
    if out.numel():
        product_kernel[(tiles, count, matrices)](
            A,
            A.stride(0),
            A.stride(1),
            B,
            B.stride(0),
            B.stride(1),
            B.stride(2),
            out,
            rows,
            depth,
            B.shape[2],
            each,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            STEP=STEP,
            WHOLE=whole,
            num_warps=warps(B.stride(2) != 1, whole, gpu.capability(A.device)),
            num_stages=STAGES,
            enable_fp_fusion=True,
        )
    return out


@gpu.jit("n", "size")
def invert_kernel(  # type: ignore[no-untyped-def]
    U, u_matrix, u_row, inverses, n, size, UNIT: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr
):
    """PART columns of the inverse of one of the corners that a matrix U's diagonal is cut into."""
    lo = tl.program_id(0) * size
    matrix = tl.program_id(2).to(tl.int64)
    width = tl.minimum(size, n - lo)
    i = tl.arange(0, COLUMNS)
    j = tl.program_id(1) * PART + tl.arange(0, PART)
    u_row = tl.cast(u_row, tl.int64)
    corner = U + matrix * u_matrix + lo * (u_row + 1)
    X = (i[:, None] == j[None, :]).to(tl.float32)
    for step in range(width):  # back substitution, U's columns divided by its diagonal
        k = width - 1 - step
        u = tl.load(corner + i * u_row + k, mask=i < k, other=0.0) / tl.load(corner + k * (u_row + 1))
        X -= u[:, None] * tl.sum(tl.where((i == k)[:, None], X, 0.0), 0)[None, :]
    if not UNIT:
        X /= tl.load(corner + i * (u_row + 1), mask=i < width, other=1.0)[:, None]
    own = inverses + (matrix * tl.num_programs(0) + tl.program_id(0)) * (COLUMNS * COLUMNS)
    tl.store(own + i[:, None] * COLUMNS + j[None, :], X)


def invert(U: Tensor, inverses: Tensor, size: int, unit: bool = False) -> None:
    """inverses[m, b] [128, 128] = inv(U[m]_bb), padded with the identity, for the corners of ``size`` <= 128 columns
    that U's diagonal is cut into. ``unit``: inv(U_bb Λ⁻¹), Λ being U_bb's diagonal, so that its own is exactly 1.

    U: [matrices, n, n] fp32 with contiguous rows; its upper triangle is read.
    """
    invert_kernel[(inverses.shape[1], COLUMNS // INVERTED, len(inverses))](
        U,
        U.stride(0),
        U.stride(1),
        inverses,
        U.shape[1],
        size,
        UNIT=unit,
        COLUMNS=COLUMNS,
        PART=INVERTED,
        num_warps=4,
        enable_fp_fusion=True,
    )
