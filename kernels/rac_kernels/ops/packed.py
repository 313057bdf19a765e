"""A pruned matrix in one tensor of bytes: a bit a weight says what is kept, and only that is stored.

The format, version 1, little-endian; each part begins at a multiple of 64 bytes, and what lies between is zero:

1. header, 64 bytes: ``RACPACK`` and a zero byte, u16 version, u8 dtype of the dense matrix (0 bf16, 1 fp16, 2 fp32), u8
   kind of values (0 as in the dense matrix, 1 int8, 2 int4), u32 matrices (0: two dimensions; E ≥ 1: [E, rows,
   columns], all rows of which follow one another), u32 rows, u32 columns, u32 columns a scale (0 without scales), u64
   kept values, zeros;
2. row index, u32 [all rows + 1]: where the values of each row begin, in units of 4 bytes;
3. mask, u64 [all rows, ⌈columns / 64⌉]: bit j of word w says whether column 64 w + j is kept;
4. scales, bf16 [all rows, ⌈columns / group⌉], for int8 and int4: one for a row's columns of a block, 0 if none is kept;
5. values, row after row, by column: of the dense dtype, int8 of −127 to 127, or int4 of −7 to 7, two in a byte, the
   first one in the lower half. Then 64 bytes of zeros, for those who read beyond the end.

Sizes and offsets follow from the header and the row index's last entry, so that a tensor cannot contradict itself. A
value stands for scale · code, a product in fp32, rounded to the dense dtype.

Plain torch, on any device; a block of rows at a time, so that little is needed beside the matrix and its packed form.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

Values = Literal["same", "int8", "int4"]
"""How kept values are stored: as in the dense matrix, bit for bit, or as integers with a scale for a row's columns of a
block."""

VERSION = 1
MAGIC = b"RACPACK\0"
HEADER = 64
"""Bytes of the header, and of the zeros after the last value."""
ALIGNMENT = 64
"""Each part begins at a multiple of so many bytes."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What dense matrices may be of, by the header's code."""
VALUES: tuple[Values, ...] = get_args(Values)
"""The kinds of values, by the header's code."""
LARGEST = {"int8": 127, "int4": 7}
"""The largest code; the smallest is its negative."""

_FIELDS = struct.Struct("<8sHBBIIIIQ")
_BLOCK = 1 << 20  # elements looked at together
_KEPT = 32  # values that a scale should be for
_BIT_TYPES = {2: torch.int16, 4: torch.int32}
_SAMPLE = 512  # groups that tell whether a matrix lies on a grid
_LARGEST_INDEX = 2**31 - 1  # so that it can be read as int32


def packed_group(columns: int, density: float) -> int:
    """Columns that share a scale in a row: the power of two times 64 of which about 32 are kept at this density, and no
    more than the columns need. A scale then costs half a bit a kept value, and belongs to a fixed tile of columns.

    density: the share of the matrix that is kept, 0 to 1.
    """
    group = 64
    while group < columns and abs(2 * group * density - _KEPT) < abs(group * density - _KEPT):
        group *= 2
    return group


@dataclass(frozen=True)
class PackedLayout:
    """What a packed matrix is and where its parts lie; all but the fields follows from them."""

    dtype: torch.dtype
    """Of the dense matrix: bf16, fp16 or fp32."""
    values: Values
    shape: tuple[int, ...]
    """Of the dense matrix: [rows, columns] or [matrices, rows, columns]."""
    group: int
    """Columns that share a scale in a row, a power of two times 64; 0 for "same"."""
    kept: int
    """Values that are stored."""
    value_bytes: int
    """Their size, with what rounds up each row to 4 bytes: 4 times the row index's last entry."""

    @cached_property
    def rows(self) -> int:
        """All rows: of a batch of matrices, those of each one after the other."""
        return self.shape[0] if len(self.shape) == 2 else self.shape[0] * self.shape[1]

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @cached_property
    def words(self) -> int:
        """Words of 64 bits that a row's mask takes."""
        return -(-self.columns // 64)

    @cached_property
    def groups(self) -> int:
        """Scales a row."""
        return -(-self.columns // self.group) if self.group else 0

    @property
    def bits(self) -> int:
        """Bits a kept value takes."""
        return {"same": 8 * self.dtype.itemsize, "int8": 8, "int4": 4}[self.values]

    @cached_property
    def index_at(self) -> int:
        return HEADER

    @cached_property
    def mask_at(self) -> int:
        return _aligned(HEADER + 4 * (self.rows + 1))

    @cached_property
    def scales_at(self) -> int:
        return _aligned(self.mask_at + 8 * self.rows * self.words)

    @cached_property
    def values_at(self) -> int:
        return _aligned(self.scales_at + 2 * self.rows * self.groups)

    @cached_property
    def size(self) -> int:
        """Bytes in all."""
        return _aligned(self.values_at + self.value_bytes) + ALIGNMENT

    @property
    def dense_size(self) -> int:
        """Bytes of the dense matrix."""
        return self.rows * self.columns * self.dtype.itemsize

    def header(self) -> bytes:
        """Write down what the header holds."""
        matrices, rows = (0, self.shape[0]) if len(self.shape) == 2 else self.shape[:2]
        kinds = DTYPES.index(self.dtype), VALUES.index(self.values)
        fields = _FIELDS.pack(MAGIC, VERSION, *kinds, matrices, rows, self.columns, self.group, self.kept)
        return fields.ljust(HEADER, b"\0")

    @classmethod
    def from_header(cls, header: bytes) -> PackedLayout:
        """Read a header of 64 bytes; `value_bytes` is not in it and remains 0.

        Raises ValueError for what is no header of a version that is known here.
        """
        if len(header) < HEADER or header[: len(MAGIC)] != MAGIC:
            raise ValueError("it does not begin as a packed matrix does")
        _, version, dtype, values, matrices, rows, columns, group, kept = _FIELDS.unpack_from(header)
        if version != VERSION:
            raise ValueError(f"it is of version {version}; this release knows version {VERSION}")
        if dtype >= len(DTYPES) or values >= len(VALUES):
            raise ValueError(f"its header names dtype {dtype} and kind of values {values}, which do not exist")
        if any(header[_FIELDS.size : HEADER]):
            raise ValueError("its header does not end in zeros")
        shape = (matrices, rows, columns) if matrices else (rows, columns)
        layout = cls(DTYPES[dtype], VALUES[values], shape, group, kept, 0)
        if (layout.values == "same") != (group == 0) or group % 64 or group & (group - 1):
            raise ValueError(f"its scales are for {group} columns each, which its kind of values cannot have")
        if kept > layout.rows * columns:
            raise ValueError(f"it keeps {kept} of {layout.rows * columns} values")
        return layout


class Packed:
    """A packed matrix: `data`, uint8 [layout.size] on any device, and views of its parts.

    Made by `pack`, or by `from_tensor`, which checks; the constructor trusts its arguments.
    """

    def __init__(self, data: Tensor, layout: PackedLayout) -> None:
        self.data = data
        self.layout = layout

    @classmethod
    def from_tensor(cls, data: Tensor) -> Packed:
        """Take a tensor that was read from a file, once all of it is found to hold together.

        data: uint8, one-dimensional. Copied only if it does not lie at a multiple of 8 bytes or is not contiguous.
        Raises ValueError, one line: not a packed matrix, another version, a size that does not fit, mask, row index,
        scales or values that contradict each other, or padding that is not zero.
        """
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise ValueError(f"a packed matrix is one row of bytes, not {data.dtype} of {data.dim()} dimensions")
        if data.storage_offset() % 8 or data.data_ptr() % 8 or not data.is_contiguous():
            data = data.clone(memory_format=torch.contiguous_format)
        layout = PackedLayout.from_header(bytes(data[:HEADER].tolist()))
        if layout.size > len(data):
            raise ValueError(f"it has {len(data)} bytes, and its header asks for {layout.size} and more")
        last = int(cls(data, layout).row_index[-1])
        if last < 0:
            raise ValueError("its values take 8 GiB or more")
        layout = replace(layout, value_bytes=4 * last)
        if layout.size != len(data):
            raise ValueError(f"it has {len(data)} bytes, and header and row index ask for {layout.size}")
        packed = cls(data, layout)
        _check(packed)
        return packed

    @property
    def row_index(self) -> Tensor:
        """int32 [all rows + 1]: where each row's values begin, in units of 4 bytes."""
        return self._part(self.layout.index_at, 4 * (self.layout.rows + 1)).view(torch.int32)

    @property
    def mask(self) -> Tensor:
        """int64 [all rows, words]: bit j of word w is column 64 w + j."""
        layout = self.layout
        return (
            self._part(layout.mask_at, 8 * layout.rows * layout.words).view(torch.int64).view(layout.rows, layout.words)
        )

    @property
    def scales(self) -> Tensor:
        """bf16 [all rows, groups]; [all rows, 0] for "same"."""
        layout = self.layout
        part = self._part(layout.scales_at, 2 * layout.rows * layout.groups)
        return part.view(torch.bfloat16).view(layout.rows, layout.groups)

    @property
    def codes(self) -> Tensor:
        """uint8 [value bytes]: the values as they are stored; 64 bytes of zeros follow in `data`."""
        return self._part(self.layout.values_at, self.layout.value_bytes)

    def to(self, device: torch.device | str) -> Packed:
        """Put it on a device."""
        return Packed(self.data.to(device), self.layout)

    def rows(self, first: int, to: int) -> Packed:
        """Take rows `first` to `to` of the matrix (of each matrix of a batch) as a packed matrix of its own."""
        layout = self.layout
        count = layout.shape[-2]
        if not 0 <= first <= to <= count:
            raise ValueError(f"rows {first} to {to} of {count}")
        if len(layout.shape) == 2:
            return self._slice(first, to, (to - first, layout.columns))
        parts = [self._slice(at + first, at + to, (to - first, layout.columns)) for at in range(0, layout.rows, count)]
        return _joined(parts, (layout.shape[0], to - first, layout.columns))

    def matrices(self, first: int, to: int) -> Packed:
        """Take matrices `first` to `to` of a batch as a packed batch of its own."""
        layout = self.layout
        if len(layout.shape) != 3 or not 0 <= first < to <= layout.shape[0]:
            raise ValueError(f"matrices {first} to {to} of {list(layout.shape)}")
        count = layout.shape[1]
        return self._slice(first * count, to * count, (to - first, *layout.shape[1:]))

    def columns(self, first: int, to: int) -> Packed:
        """Take columns `first` to `to` of every row as a packed matrix of its own, codes and scales as they are.

        Raises ValueError if `first` is no multiple of the columns of a scale.
        """
        layout = self.layout
        if not 0 <= first <= to <= layout.columns or first % (layout.group or 1):
            raise ValueError(f"columns {first} to {to} of {layout.columns} with {layout.group} columns a scale")
        scales = self.scales[:, first // layout.group : -(-to // layout.group)] if layout.group else self.scales
        blocks = [(mask[:, first:to], codes[:, first:to]) for _, _, mask, codes in _decoded(self)]
        shape = (*layout.shape[:-1], to - first)
        counts = (
            torch.cat([mask.sum(1) for mask, _ in blocks]) if blocks else torch.zeros_like(self.row_index[1:]).long()
        )
        made = _empty(layout.dtype, layout.values, shape, layout.group, counts)
        at = 0
        for mask, codes in blocks:
            _encode(made, at, mask, codes)
            at += len(mask)
        if layout.group:
            made.scales.copy_(scales.where(_kept_by_group(made, 0, layout.rows) > 0, 0))
        return made

    def _part(self, at: int, size: int) -> Tensor:
        return self.data[at : at + size]

    def _slice(self, first: int, to: int, shape: tuple[int, ...]) -> Packed:
        """Rows of all rows, copied; they are of the shape given."""
        return take_rows(self.layout, self._part, first, to, shape)

    def _write_header(self) -> None:
        self.data[:HEADER] = torch.tensor(list(self.layout.header()), dtype=torch.uint8)


def take_rows(
    layout: PackedLayout, read: Callable[[int, int], Tensor], first: int, to: int, shape: tuple[int, ...]
) -> Packed:
    """Take some of all rows as a packed matrix of its own, of the shape given, from wherever the whole one lies.

    read: gives so many bytes, uint8, from an offset in the whole one's data. Raises ValueError for a row index that
    leads out of it; what else is to be said of the parts, `from_tensor` of the result's data says.
    """
    index = read(layout.index_at + 4 * first, 4 * (to - first + 1)).view(torch.int32)
    begin, end = int(index[0]), int(index[-1])
    if not 0 <= begin <= end <= layout.value_bytes // 4:
        raise ValueError("its row index leads out of it")
    mask = read(layout.mask_at + 8 * first * layout.words, 8 * (to - first) * layout.words).view(torch.int64)
    scales = read(layout.scales_at + 2 * first * layout.groups, 2 * (to - first) * layout.groups)
    kept = int(_bit_counts(mask.view(to - first, layout.words)).sum())
    own = replace(layout, shape=shape, kept=kept, value_bytes=4 * (end - begin))
    made = Packed(index.new_zeros(own.size, dtype=torch.uint8), own)
    made._write_header()
    made.row_index.copy_(index - begin)
    made.mask.copy_(mask.view(to - first, layout.words))
    made.scales.copy_(scales.view(torch.bfloat16).view(to - first, layout.groups))
    made.codes.copy_(read(layout.values_at + 4 * begin, 4 * (end - begin)))
    return made


def join_rows(parts: Sequence[Packed]) -> Packed:
    """Put matrices [rows, columns] of the same columns, dtype, kind of values and columns a scale under one another.

    Raises ValueError if they are not.
    """
    alike = {(part.layout.dtype, part.layout.values, part.layout.columns, part.layout.group) for part in parts}
    if len(alike) != 1 or any(len(part.layout.shape) != 2 for part in parts):
        raise ValueError("matrices that are to be joined differ in columns, dtype, values or columns a scale")
    return _joined(parts, (sum(part.layout.rows for part in parts), parts[0].layout.columns))


def pack(W: Tensor, values: Values = "same", group: int | None = None, scales: Tensor | None = None) -> Packed:
    """Pack a matrix; what is zero in it is not kept.

    W: [rows, columns], or a batch [matrices, rows, columns], of bf16, fp16 or fp32, on any device. With "same" every
    bit is kept, −0.0 and NaN included. group: columns that share a scale, for int8 and int4; None: `packed_group` by
    the share that is kept. scales: [all rows, groups], which codes are rounded by. None: if the groups of W lie on
    grids, that is if some scale in bf16 and codes within range give back all their values bit for bit, these are found
    again; other groups are rounded to nearest, with a scale by least squares.

    Raises ValueError: another dtype or shape, values that are not finite for int8 or int4, scales that do not fit.
    """
    if W.dtype not in DTYPES or W.dim() not in (2, 3) or (W.dim() == 3 and not len(W)):
        raise ValueError(f"a matrix of {W.dtype} and shape {list(W.shape)} cannot be packed")
    if values not in VALUES:
        raise ValueError(f"values {values!r} must be one of {', '.join(VALUES)}")
    flat = W.reshape(W.shape[:-1].numel(), W.shape[-1])
    if values == "same":
        return _pack_same(flat, tuple(W.shape))
    counts = torch.zeros(len(flat), dtype=torch.int64, device=W.device)
    for first, to in _blocks(*flat.shape):
        counts[first:to] = (flat[first:to] != 0).sum(1)
        if not flat[first:to].isfinite().all():
            raise ValueError("a matrix with values that are not finite cannot be packed in integers")
    on_grid = False
    if scales is None:
        group, on_grid = _group_of(flat, values, group, int(counts.sum()))
    elif group is None:
        group = packed_group(W.shape[-1], int(counts.sum()) / max(W.numel(), 1))
    if group < 64 or group & (group - 1):
        raise ValueError(f"{group} columns a scale: it must be 64, 128, 256, …")
    made = _empty(W.dtype, values, tuple(W.shape), group, counts)
    if scales is not None and (scales.shape != made.scales.shape or not (scales.isfinite() & (scales >= 0)).all()):
        raise ValueError(f"scales {list(scales.shape)} must be {list(made.scales.shape)}, finite and not negative")
    for first, to in _blocks(*flat.shape):
        wide = _grouped(flat[first:to], group)
        if scales is not None:
            kept = (wide != 0).any(-1)
            own = scales[first:to].to(torch.bfloat16).float().where(kept, 0)
        else:
            own = _scales(wide, values, W.dtype, on_grid)
        codes = _codes(wide, own, LARGEST[values])
        made.scales[first:to] = own
        _encode(made, first, flat[first:to] != 0, codes.flatten(1)[:, : W.shape[-1]])
    return made


def unpack(packed: Packed, out: Tensor | None = None) -> Tensor:
    """Make the dense matrix, of the shape and dtype that was packed, into `out` if it is given; returns it."""
    layout = packed.layout
    if out is None:
        out = torch.empty(layout.shape, dtype=layout.dtype, device=packed.data.device)
    elif out.shape != layout.shape or out.dtype != layout.dtype:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, the matrix {layout.dtype} {list(layout.shape)}")
    flat = out.view(layout.rows, layout.columns)
    for first, to, _, codes in _decoded(packed):
        if layout.values == "same":
            flat[first:to] = codes.view(layout.dtype)
        else:
            wide = _grouped(codes, layout.group) * packed.scales[first:to, :, None].float()
            flat[first:to] = wide.flatten(1)[:, : layout.columns]
    return out


def packed_size(
    shape: Sequence[int], kept: int, dtype: torch.dtype = torch.bfloat16, values: Values = "same", group: int = 0
) -> int:
    """Bytes that a matrix of this shape takes with so many values kept, at most: rows round up to 4 bytes each.

    group: columns a scale, for int8 and int4; 0: `packed_group`.
    """
    columns = shape[-1]
    if values != "same" and not group:
        group = packed_group(columns, kept / max(torch.Size(shape).numel(), 1))
    layout = PackedLayout(dtype, values, tuple(shape), group if values != "same" else 0, kept, 0)
    spare = 4 - layout.bits // 8 if layout.bits >= 8 else 3.5
    return replace(layout, value_bytes=4 * int(-(-(kept * layout.bits / 8 + layout.rows * spare) // 4))).size


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _blocks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows to work on, first and last + 1."""
    step = max(_BLOCK // max(columns, 1), 1)
    for first in range(0, rows if columns else 0, step):
        yield first, min(first + step, rows)


def _empty(dtype: torch.dtype, values: Values, shape: tuple[int, ...], group: int, counts: Tensor) -> Packed:
    """A packed matrix of so many values by row, int64 [all rows], with header and row index, and all else zero."""
    layout = PackedLayout(dtype, values, shape, group, int(counts.sum()), 0)
    ends = (counts * layout.bits + 31).div_(32, rounding_mode="floor").cumsum(0)
    units = int(ends[-1]) if len(ends) else 0
    if units > _LARGEST_INDEX or max(shape) >= 2**32:
        raise ValueError(f"a matrix of {list(shape)} is too large: kept values may take 8 GiB")
    layout = replace(layout, value_bytes=4 * units)
    made = Packed(torch.zeros(layout.size, dtype=torch.uint8, device=counts.device), layout)
    made._write_header()
    made.row_index[1:] = ends
    return made


def _pack_same(flat: Tensor, shape: tuple[int, ...]) -> Packed:
    if not flat.is_contiguous():
        flat = flat.contiguous()
    bits = flat.view(_BIT_TYPES[flat.dtype.itemsize])
    counts = torch.zeros(len(flat), dtype=torch.int64, device=flat.device)
    for first, to in _blocks(*flat.shape):
        counts[first:to] = (bits[first:to] != 0).sum(1)
    made = _empty(flat.dtype, "same", shape, 0, counts)
    for first, to in _blocks(*flat.shape):
        _encode(made, first, bits[first:to] != 0, bits[first:to])
    return made


def _joined(parts: Sequence[Packed], shape: tuple[int, ...]) -> Packed:
    """All rows of several, one after the other."""
    layouts = [part.layout for part in parts]
    layout = replace(
        layouts[0],
        shape=shape,
        kept=sum(one.kept for one in layouts),
        value_bytes=sum(one.value_bytes for one in layouts),
    )
    if layout.value_bytes > 4 * _LARGEST_INDEX:
        raise ValueError("matrices together have more than 8 GiB of values")
    made = Packed(parts[0].data.new_zeros(layout.size), layout)
    made._write_header()
    row = unit = 0
    for part in parts:
        to, end = row + part.layout.rows, unit + part.layout.value_bytes // 4
        made.row_index[row : to + 1] = part.row_index + unit
        made.mask[row:to] = part.mask
        made.scales[row:to] = part.scales
        made.codes[4 * unit : 4 * end] = part.codes
        row, unit = to, end
    return made


# ---- bits and codes of a block of rows ----


@cache
def _bytes_of_bits(device: torch.device) -> Tensor:
    """int64 [256]: the eight bits of a byte as eight bytes of 0 or 1."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten().to(device)


@cache
def _bit_count(device: torch.device) -> Tensor:
    """uint8 [256]: how many bits of a byte are set."""
    return (torch.arange(256)[:, None] >> torch.arange(8) & 1).sum(1).to(torch.uint8).to(device)


def _bit_counts(mask: Tensor) -> Tensor:
    """int64 [rows, words]: the bits set in each word of a mask."""
    rows, words = mask.shape
    each = _bit_count(mask.device).index_select(0, mask.contiguous().view(torch.uint8).flatten().int())
    return each.view(rows, words, 8).sum(-1)


def _padded(block: Tensor, width: int) -> Tensor:
    """A block [rows, columns] with columns of zeros after it, of `width` in all."""
    if block.shape[1] == width:
        return block.contiguous()
    wide = block.new_zeros(len(block), width)
    wide[:, : block.shape[1]] = block
    return wide


def _to_bits(mask: Tensor, words: int) -> Tensor:
    """int64 [rows, words] of a bool mask [rows, columns]."""
    eights = _padded(mask, 64 * words).view(torch.uint8).view(torch.int64)
    # Eight bytes of 0 or 1 become eight bits: byte i, at bit 8 i, is moved to bit 56 + i by the factor 2^(56 − 7 i).
    return (eights * 0x0102040810204080 >> 56).to(torch.uint8).view(torch.int64)


def _from_bits(mask: Tensor, columns: int) -> Tensor:
    """bool [rows, columns] of int64 [rows, words]."""
    eights = _bytes_of_bits(mask.device).index_select(0, mask.contiguous().view(torch.uint8).flatten().int())
    return eights.view(torch.bool).view(len(mask), -1)[:, :columns]


def _with_spare(mask: Tensor, bits: int) -> Tensor:
    """A mask with columns beyond it which are set so that each row's values take a multiple of 32 bits."""
    a_unit = 32 // bits
    if a_unit == 1:
        return mask
    spare = (-mask.sum(1))[:, None] % a_unit
    return torch.cat((mask, torch.arange(a_unit - 1, device=mask.device) < spare), dim=1)


def _encode(made: Packed, first: int, mask: Tensor, codes: Tensor) -> None:
    """Write a block of rows: mask bool [rows, columns], codes the same, the values' bits or int8."""
    layout = made.layout
    made.mask[first : first + len(mask)] = _to_bits(mask, layout.words)
    chosen = _with_spare(mask, layout.bits)
    some = torch.masked_select(_padded(codes, chosen.shape[1]), chosen)
    if layout.values == "int4":
        some = some[0::2] & 15 | some[1::2] << 4
    at = 4 * int(made.row_index[first])
    stored = some.view(torch.uint8)
    made.codes[at : at + len(stored)] = stored


def _decoded(packed: Packed) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Blocks of rows: first, last + 1, mask bool [rows, columns], codes (the values' bits, or int8) likewise."""
    layout = packed.layout
    kind = _BIT_TYPES[layout.dtype.itemsize] if layout.values == "same" else torch.int8
    for first, to in _blocks(layout.rows, layout.columns):
        mask = _from_bits(packed.mask[first:to], layout.columns)
        begin, end = (4 * unit for unit in packed.row_index[[first, to]].tolist())
        stored = packed.codes[begin:end]
        if layout.values == "int4":
            pairs = stored.view(torch.int8)
            some = torch.stack((pairs << 4 >> 4, pairs >> 4), dim=1).flatten()
        else:
            some = stored.view(kind)
        chosen = _with_spare(mask, layout.bits)
        codes = torch.zeros(chosen.shape, dtype=kind, device=mask.device).masked_scatter_(chosen, some)
        yield first, to, mask, codes[:, : layout.columns].contiguous()


def _kept_by_group(packed: Packed, first: int, to: int) -> Tensor:
    """int64 [rows, groups]: how many values each scale is for, in rows `first` to `to`."""
    layout = packed.layout
    counts = _bit_counts(packed.mask[first:to])
    width = layout.group // 64
    return _padded(counts, layout.groups * width).view(to - first, layout.groups, width).sum(-1)


# ---- scales ----


def _grouped(block: Tensor, group: int) -> Tensor:
    """fp32 [rows, groups, columns a group] of a block [rows, columns], zeros beyond the last column."""
    groups = -(-block.shape[1] // group)
    return _padded(block, groups * group).view(len(block), groups, group).float()


def _codes(wide: Tensor, scales: Tensor, largest: int) -> Tensor:
    """int8: the nearest codes of wide [rows, groups, columns] by scales [rows, groups] fp32."""
    each = scales[..., None]
    return (wide / each.where(each > 0, torch.inf)).round_().clamp_(-largest, largest).to(torch.int8)


def _bf16_beside(scales: Tensor, step: int) -> Tensor:
    """fp32: the bf16 number that is `step` after the one nearest to each of `scales`, positive ones."""
    near = scales.bfloat16().view(torch.int16) + step
    return near.clamp_(1, 0x7F7F).view(torch.bfloat16).float()


def _gives_back(wide: Tensor, scales: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """bool […]: whether codes within range by these scales […] are the groups wide […, columns] bit for bit."""
    each = scales[..., None]
    codes = (wide / each).round_().clamp_(-largest, largest)
    return ((codes * each).to(dtype).float() == wide).all(-1)


def _on_grid(wide: Tensor, values: Values, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scales fp32 [groups] with which each group of wide [groups, columns] lies on a grid, and whether it does.

    The largest magnitude is round(scale · code), so that the scale is one of those next to it divided by a code.
    """
    largest = LARGEST[values]
    top = wide.abs().amax(-1)
    scales = torch.zeros_like(top)
    missing = (top > 0).nonzero().flatten()
    left = wide[missing]
    for code in range(largest, 0, -1):
        for step in (0, 1, -1):
            if not len(missing):
                break
            trial = _bf16_beside(top[missing] / code, step)
            found = _gives_back(left, trial, largest, dtype)
            if found.any():
                scales[missing[found]] = trial[found]
                missing, left = missing[~found], left[~found]
    return scales, (scales > 0) | (top == 0)


def _may_lie_on_grid(wide: Tensor, values: Values, dtype: torch.dtype) -> bool:
    """Whether each of a few groups, fp32 [groups, columns], lies on a grid: all scales are tried at once."""
    largest = LARGEST[values]
    near = wide.abs().amax(-1, keepdim=True) / torch.arange(1, largest + 1, device=wide.device)
    trials = torch.cat([_bf16_beside(near, step) for step in (0, 1, -1)], dim=1)
    return bool(_gives_back(wide[:, None], trials, largest, dtype).any(1).all())


def _group_of(flat: Tensor, values: Values, group: int | None, kept: int) -> tuple[int, bool]:
    """How many columns share a scale, and whether a sample of the groups lies on a grid.

    A grid is looked for with the columns that the density asks for, and with half and twice as many: the density that
    the grid was made for may have been another one, for codes that are 0 are not kept.
    """
    usual = packed_group(flat.shape[1], kept / max(flat.numel(), 1))
    tried = [group] if group is not None else [2 * usual, usual, max(usual // 2, 64)]
    chosen = usual if group is None else group
    if not flat.numel():
        return chosen, False
    for width in tried:
        groups = -(-flat.shape[1] // width)
        rows = torch.linspace(0, len(flat) - 1, min(len(flat), -(-_SAMPLE // groups)), device=flat.device).long()
        some = _grouped(flat[rows], width).flatten(0, 1)
        some = some[(some != 0).sum(-1) > 1][:_SAMPLE]
        if not _may_lie_on_grid(some[:4], values, flat.dtype):
            continue
        if not len(some) or _on_grid(some, values, flat.dtype)[1].all():
            return width, True
    return chosen, False


def _scales(wide: Tensor, values: Values, dtype: torch.dtype, on_grid: bool) -> Tensor:
    """fp32 [rows, groups], numbers of bf16: those of the grid that a group lies on, or else by least squares."""
    if not on_grid:
        return _least_squares(wide, LARGEST[values], dtype)
    groups = wide.flatten(0, 1)
    scales, found = _on_grid(groups, values, dtype)
    if not found.all():
        rest = (~found).nonzero().flatten()
        scales[rest] = _least_squares(groups[rest], LARGEST[values], dtype)
    return scales.view(wide.shape[:2])


def _least_squares(wide: Tensor, largest: int, dtype: torch.dtype) -> Tensor:
    """fp32 […]: for groups wide […, columns] the scale with the smallest sum of squared gaps to the nearest codes.

    From the scale that makes the largest magnitude the largest code, and from smaller ones that clip it, rounding and
    least squares are taken in turn.
    """
    top = wide.abs().amax(-1)
    shares = wide / top.where(top > 0, 1)[..., None]  # of the largest magnitude, so that no square overflows
    bound = _bound(largest, dtype)
    best, least = torch.zeros_like(top), torch.full_like(top, torch.inf)
    for start in (1.0, 0.92, 0.84) if largest < 127 else (1.0,):
        scale = top * (start / largest)
        for _ in range(3):
            scale = _bf16_beside(scale, 0).clamp_max(bound)
            codes = (wide / scale[..., None]).round_().clamp_(-largest, largest)
            error = (codes * (scale / top.where(top > 0, 1))[..., None]).sub_(shares).square_().sum(-1)
            better = error < least
            best, least = scale.where(better, best), error.where(better, least)
            scale = (shares * codes).sum(-1) / codes.square_().sum(-1).clamp_min_(1) * top
    return best.where(top > 0, 0)


def _bound(largest: int, dtype: torch.dtype) -> float:
    """The largest number of bf16 that gives a finite one of the dtype when it is multiplied by `largest`."""
    most = torch.tensor(min(torch.finfo(dtype).max, torch.finfo(torch.float32).max) / largest)
    near = most.bfloat16()
    return float(near if near <= most else (near.view(torch.int16) - 1).view(torch.bfloat16))


# ---- checks ----


def _check(packed: Packed) -> None:
    """Raise ValueError, one line, unless all parts agree with each other."""
    layout = packed.layout
    ends = (
        (layout.index_at + 4 * (layout.rows + 1), layout.mask_at),
        (layout.mask_at + 8 * layout.rows * layout.words, layout.scales_at),
        (layout.scales_at + 2 * layout.rows * layout.groups, layout.values_at),
        (layout.values_at + layout.value_bytes, layout.size),
    )
    if any(bool(packed.data[at:to].any()) for at, to in ends):
        raise ValueError("what lies between its parts is not zero")
    beyond = layout.columns % 64
    if beyond and layout.rows and bool((packed.mask[:, -1] >> beyond & (1 << 64 - beyond) - 1).any()):
        raise ValueError(f"its mask has bits beyond column {layout.columns}")
    kept = packed.row_index.new_zeros(layout.rows, dtype=torch.int64)
    for first, to in _blocks(layout.rows, layout.columns):
        kept[first:to] = _bit_counts(packed.mask[first:to]).sum(1)
    if int(kept.sum()) != layout.kept:
        raise ValueError(f"its mask keeps {int(kept.sum())} values, and its header says {layout.kept}")
    index = packed.row_index.long()
    wrong = (index.diff() != (kept * layout.bits + 31).div_(32, rounding_mode="floor")).nonzero().flatten()
    if int(index[0]) or len(wrong):
        raise ValueError(f"its row index contradicts its mask at row {int(wrong[0]) if len(wrong) else 0}")
    _check_values(packed, kept)


def _check_values(packed: Packed, kept: Tensor) -> None:
    """Go on with the rest: what fills up each row, codes that do not exist, scales. kept: int64 [all rows]."""
    layout = packed.layout
    if layout.value_bytes:
        # The last unit of a row, without what belongs to its values.
        last = packed.codes.view(torch.int32)[(packed.row_index[1:].long() - 1).clamp_min_(0)].long() & 0xFFFFFFFF
        if bool(((last >> (kept * layout.bits % 32)) * (kept * layout.bits % 32 > 0)).any()):
            raise ValueError("what fills up its rows to 4 bytes is not zero")
    if layout.values == "same":
        return
    # A little at a time: what was needed for it stays with the process, beside the loaded model.
    for at in range(0, layout.value_bytes, _BLOCK // 4):
        codes = packed.codes[at : at + _BLOCK // 4]
        none = (codes == 0x80) if layout.values == "int8" else ((codes & 15) == 8) | (codes >> 4 == 8)
        if bool(none.any()):
            raise ValueError(f"its values hold a code below {-LARGEST[layout.values]}")
    for first, to in _blocks(layout.rows, layout.columns):
        scales = packed.scales[first:to]
        if bool(((scales.view(torch.int16) < 0) | ~scales.isfinite()).any()):
            raise ValueError("its scales are not all finite and positive")
        if bool((scales[_kept_by_group(packed, first, to) == 0] != 0).any()):
            raise ValueError("it has scales of groups in which nothing is kept")
