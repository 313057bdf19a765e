"""Packed matrices cut and put together as an engine's weight loaders do it with dense ones.

Such a loader takes parts of a loaded weight (the rows of some heads, the columns of a rank) by `narrow` and copies
them into parts of a parameter (q, k and v under one another) by `narrow` and `copy_`. `Piece` is a weight that lets
itself be cut so, packed or dense, and `Place` the parameter: it notes what was copied where.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rac_kernels import Packed, join_rows, pack, packed_size, unpack
from rac_kernels.ops.packed import MAGIC

Span = tuple[int, int]
"""First and last + 1."""


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor of a checkpoint is a packed matrix, by its first bytes."""
    return tensor.dtype == torch.uint8 and tensor.dim() == 1 and bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


@dataclass(frozen=True)
class Piece:
    """Rows and columns of a loaded matrix [rows, columns], packed or dense."""

    whole: Packed | Tensor
    rows: Span
    columns: Span

    @classmethod
    def of(cls, tensor: Tensor) -> Piece:
        """All of a tensor of a checkpoint. Raises ValueError for a packed matrix that is damaged."""
        whole = Packed.from_tensor(tensor) if is_packed(tensor) else tensor
        shape = whole.layout.shape if isinstance(whole, Packed) else whole.shape
        if len(shape) != 2:
            raise ValueError(f"a matrix has two dimensions, not {list(shape)}")
        return cls(whole, (0, shape[0]), (0, shape[1]))

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]))

    def size(self, dim: int | None = None) -> Any:
        """As that of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def narrow(self, dim: int, start: int, length: int) -> Piece:
        """As that of a tensor."""
        if dim % 2 == 0:
            return Piece(self.whole, _within(self.rows, start, length), self.columns)
        return Piece(self.whole, self.rows, _within(self.columns, start, length))

    def taken(self) -> Packed | Tensor:
        """The piece by itself: packed if it is so or if that makes it smaller, else dense."""
        if isinstance(self.whole, Packed):
            packed = self.whole
            if self.rows != (0, packed.layout.rows):
                packed = packed.rows(*self.rows)
            return packed if self.columns == (0, packed.layout.columns) else _columns(packed, *self.columns)
        dense = self.whole[slice(*self.rows), slice(*self.columns)]
        kept = int(dense.count_nonzero())
        if packed_size(dense.shape, kept, dense.dtype) < dense.numel() * dense.itemsize:
            return pack(dense)
        return dense.clone()


def _within(span: Span, start: int, length: int) -> Span:
    first = span[0] + start
    if start < 0 or length < 0 or first + length > span[1]:
        raise IndexError(f"{length} from {start} of {span[1] - span[0]}")
    return first, first + length


def _columns(packed: Packed, first: int, to: int) -> Packed:
    """Columns of a packed matrix, with the values that it stands for.

    Where a scale's columns are cut in two, scales are for fewer columns, and where that is not enough the values are
    stored as in the dense matrix.
    """
    layout = packed.layout
    if not layout.group or first % layout.group == 0:
        return packed.columns(first, to)
    dense = unpack(packed)[:, first:to].contiguous()
    group = 64
    if first % group:
        return pack(dense)
    spread = packed.scales.repeat_interleave(layout.group // group, dim=1)
    return pack(dense, layout.values, group, spread[:, first // group : -(-to // group)])


@dataclass
class Place:
    """A parameter [rows, columns] that pieces are copied into; a part of it shares what was copied with the whole."""

    rows: Span
    columns: Span
    found: dict[Span, Packed | Tensor] = field(default_factory=dict)
    """What was copied, by its rows."""
    output_dim = 0
    input_dim = 1

    @property
    def data(self) -> Place:
        return self

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]))

    def size(self, dim: int | None = None) -> Any:
        """As that of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def narrow(self, dim: int, start: int, length: int) -> Place:
        """As that of a tensor."""
        if dim % 2 == 0:
            return Place(_within(self.rows, start, length), self.columns, self.found)
        return Place(self.rows, _within(self.columns, start, length), self.found)

    def copy_(self, piece: Piece) -> Place:
        """Take a piece of the same shape."""
        if piece.shape != self.shape:
            raise ValueError(f"a piece {list(piece.shape)} for a place {list(self.shape)}")
        self.found[self.rows] = piece.taken()
        return self

    def parts(self) -> list[Packed | Tensor]:
        """What was copied, by rows; neighbours that are packed alike are joined. ValueError if rows are missing."""
        spans = sorted(self.found)
        ends = [self.rows[0], *(span[1] for span in spans)]
        if [span[0] for span in spans] != ends[:-1] or ends[-1] != self.rows[1]:
            raise ValueError(f"rows {spans} were loaded of {self.rows[1]}")
        return [part for run in _runs([self.found[span] for span in spans]) for part in run]


def _runs(parts: list[Packed | Tensor]) -> Iterator[list[Packed | Tensor]]:
    """Runs of packed parts as one, if they can be; all else as it is."""
    alike: list[Packed] = []
    for part in parts:
        if isinstance(part, Packed) and (not alike or _kind(part) == _kind(alike[0])):
            alike.append(part)
            continue
        yield _joined(alike)
        alike = [part] if isinstance(part, Packed) else []
        if not isinstance(part, Packed):
            yield [part]
    yield _joined(alike)


def _joined(alike: list[Packed]) -> list[Packed | Tensor]:
    return [join_rows(alike)] if len(alike) > 1 else list(alike)


def _kind(part: Packed) -> tuple[Any, ...]:
    layout = part.layout
    return layout.dtype, layout.values, layout.group
