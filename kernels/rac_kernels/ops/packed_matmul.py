"""The product with a packed matrix, Y = X Wᵀ + bias, W being read as it is stored: mask and kept values.

A few tokens (`FEW`) are bound by the bytes of W: the native kernel (csrc/cpu/packed.cpp) expands W in registers, word
by word of the mask, and multiplies at once. For more tokens the matrix is expanded a few rows at a time, which stay in
the cache, and all tokens are multiplied by them (csrc/cpu/packed_tiles.cpp). A dense matrix never exists.
packed_triton.py is the way of a GPU.

For a few tokens int8 and int4 values are multiplied as integers. Each run of at most 256 columns of a bf16 or fp16 X
becomes 16-bit integers with a scale of its own, which is finer than bf16 and fp16 are next to the largest of the run.
For more tokens they are rounded to the matrix's dtype, as `unpack` does. Beyond `MANY` torch multiplies larger tiles.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import functional as F

from rac_kernels.backends import native
from rac_kernels.backends.dispatch import choose
from rac_kernels.ops.limits import PRODUCT_PEAKS, Limit
from rac_kernels.ops.packed import DTYPES, VALUES, Packed, PackedLayout, unpack
from rac_kernels.ops.packed_triton import packed_matmul_triton

FEW = 4  # tokens, at most, for which W is expanded in registers

MANY = 512  # tokens, at most, that are multiplied here by rows of W that are expanded for them

TILE_BYTES = 2 << 20  # of W, expanded, for more tokens, which torch multiplies: a share of the cache


def packed_matmul(
    X: Tensor, packed: Packed, bias: Tensor | None = None, matrix: int | None = None, backend: str = "auto"
) -> Tensor:
    """Multiply tokens by a packed matrix: Y = X Wᵀ + bias, [..., rows] in X's dtype.

    X: [..., columns] bf16, fp16 or fp32, on the device of the packed bytes. packed: of a matrix [rows, columns], or of
    a batch [matrices, rows, columns] with `matrix` saying which one. bias: [rows], or None.

    Sums are in fp32. Without gradients. Raises ValueError if shapes, dtypes or devices do not fit.
    """
    layout = packed.layout
    if X.ndim < 1 or X.shape[-1] != layout.columns or X.dtype not in native.DTYPES:
        raise ValueError(f"X must be bf16, fp16 or fp32 [..., {layout.columns}], not {X.dtype} {list(X.shape)}")
    if (matrix is None) != (len(layout.shape) == 2) or not 0 <= (matrix or 0) < (
        1 if matrix is None else layout.shape[0]
    ):
        raise ValueError(f"matrix {matrix} of packed ones {list(layout.shape)}")
    count = layout.shape[-2]
    if bias is not None and bias.shape != (count,):
        raise ValueError(f"bias must be [{count}], not {list(bias.shape)}")
    if packed.data.device != X.device or (bias is not None and bias.device != X.device):
        raise ValueError(f"the packed matrix is on {packed.data.device} and X on {X.device}")
    chosen = choose(backend, X.device, triton=True)
    if backend == "auto" and chosen == "native" and not native.has("packed_tiles"):
        chosen = "reference"  # the extension was built from older sources
    size = layout.rows, layout.columns, (matrix or 0) * count, count
    kind = DTYPES.index(layout.dtype), VALUES.index(layout.values), layout.group
    given = X.detach() if X.requires_grad else X
    Y: Tensor = torch.ops.rac.packed_matmul.default(given, packed.data, bias, *size, *kind, chosen)
    return _WithoutGradient.apply(X, Y) if X.requires_grad and torch.is_grad_enabled() else Y


class _WithoutGradient(torch.autograd.Function):
    """A product that may not be differentiated: whoever tries is told so."""

    @staticmethod
    def forward(ctx: Any, X: Tensor, Y: Tensor) -> Tensor:
        return Y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("a product with a packed matrix has no gradient: train the dense model, and pack it again")


# Not by `torch.library.custom_op`: what that puts around a call takes as long as the product with a small matrix.
torch.library.define(
    "rac::packed_matmul",
    "(Tensor X, Tensor data, Tensor? bias, SymInt all_rows, SymInt columns, SymInt first, SymInt count, SymInt dtype, "
    "SymInt values, SymInt group, str backend) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@_disable_dynamo  # as torch.compiler.disable, which loads the compiler here and now
def _product(
    X: Tensor,
    data: Tensor,
    bias: Tensor | None,
    all_rows: int,
    columns: int,
    first: int,
    count: int,
    dtype: int,
    values: int,
    group: int,
    backend: str,
) -> Tensor:
    """X times rows first .. first + count of a packed matrix, by one backend, the arguments having been checked."""
    layout = _layout(all_rows, columns, dtype, values, group)
    if backend == "native":
        return _native(X, data, layout, bias, first, count)
    layout = replace(layout, value_bytes=data.numel() - layout.size)  # with what aligns its end
    flat = X.reshape(X.shape[:-1].numel(), columns)
    product = packed_matmul_triton if backend == "triton" else packed_matmul_reference
    return product(flat, Packed(data, layout), bias, first, count).view(*X.shape[:-1], count)


torch.library.impl("rac::packed_matmul", ("cpu", "cuda"), _product)


@torch.library.register_fake("rac::packed_matmul")
def _(
    X: Tensor,
    data: Tensor,
    bias: Tensor | None,
    all_rows: int,
    columns: int,
    first: int,
    count: int,
    dtype: int,
    values: int,
    group: int,
    backend: str,
) -> Tensor:
    return X.new_empty(*X.shape[:-1], count)


@lru_cache(4096)
def _layout(all_rows: int, columns: int, dtype: int, values: int, group: int) -> PackedLayout:
    """A layout whose offsets are known, but not how many values there are."""
    return PackedLayout(DTYPES[dtype], VALUES[values], (all_rows, columns), group, 0, 0)


def packed_matmul_reference(X: Tensor, packed: Packed, bias: Tensor | None, first: int, count: int) -> Tensor:
    """`packed_matmul` in plain torch, for any device, a block of rows at a time: X [tokens, columns] times `count`
    rows from `first` on."""
    layout = packed.layout
    Y = X.new_empty(len(X), count)
    dtype = torch.promote_types(X.dtype, layout.dtype)
    step = max(1, TILE_BYTES // (dtype.itemsize * max(1, layout.columns)))
    for at in range(0, count, step):
        to = min(count, at + step)
        W = unpack(packed.rows(first + at, first + to)).to(dtype)
        Y[:, at:to] = F.linear(X.to(dtype), W, None if bias is None else bias[at:to].to(dtype))
    return Y


def _native(X: Tensor, data: Tensor, layout: PackedLayout, bias: Tensor | None, first: int, count: int) -> Tensor:
    Y = X.new_empty((*X.shape[:-1], count))
    if not Y.numel():
        return Y
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    tokens = Y.numel() // count
    if tokens > MANY:
        _native_many(X.reshape(tokens, -1), data, layout, bias, first, Y.view(tokens, count))
        return Y
    X = X if X.is_contiguous() else X.contiguous()
    library = native.library()
    (library.packed_matmul if tokens <= FEW else library.packed_tiles)(
        Y.data_ptr(),
        count,
        X.data_ptr(),
        native.DTYPES[X.dtype],
        tokens,
        layout.columns,
        _addresses(data.data_ptr(), layout, first),
        native.DTYPES[layout.dtype],
        VALUES.index(layout.values),
        count,
        layout.columns,
        layout.group,
        0 if bias is None else bias.data_ptr(),
        native.threads(),
    )
    return Y


def _native_many(X: Tensor, data: Tensor, layout: PackedLayout, bias: Tensor | None, first: int, Y: Tensor) -> None:
    """Y [tokens, count] = X [tokens, columns] times the rows from `first` on, a tile of them at a time."""
    count = Y.shape[1]
    dtype = X.dtype if X.dtype == layout.dtype and _multiplies(X.dtype) else torch.float32
    step = max(1, TILE_BYTES // (dtype.itemsize * layout.columns))
    tile = torch.empty(min(step, count), layout.columns, dtype=dtype)
    X = X.to(dtype)
    for begin in range(0, count, step):
        end = min(count, begin + step)
        W = tile[: end - begin]
        native.library().packed_expand(
            W.data_ptr(),
            native.DTYPES[dtype],
            _addresses(data.data_ptr(), layout, first + begin),
            native.DTYPES[layout.dtype],
            VALUES.index(layout.values),
            end - begin,
            layout.columns,
            layout.group,
            native.threads(),
        )
        Y[:, begin:end] = F.linear(X, W, None if bias is None else bias[begin:end].to(dtype))


def _addresses(at: int, layout: PackedLayout, row: int) -> list[int]:
    """Addresses of index, mask and scales of a row, and of all values, in bytes that begin at `at`."""
    return [
        at + layout.index_at + 4 * row,
        at + layout.mask_at + 8 * row * layout.words,
        at + layout.scales_at + 2 * row * layout.groups if layout.groups else 0,
        at + layout.values_at,
    ]


def _multiplies(dtype: torch.dtype) -> bool:
    """Whether torch's products of this dtype run at the processor's speed: of bf16 they are emulated without the
    instructions, of fp16 always."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and native.library().isa() in ("avx512bf16", "amx"))


def limit(tokens: int, rows: int, columns: int, packed_bytes: int, dtype: torch.dtype = torch.bfloat16) -> Limit:
    """A product of X [tokens, columns] and all of W, of which its packed bytes are read; Y is written."""
    moved = packed_bytes + tokens * (rows + columns) * dtype.itemsize
    return Limit(2.0 * tokens * rows * columns, float(moved), PRODUCT_PEAKS[dtype])
