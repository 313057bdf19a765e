"""The footer of a Parquet file, read by itself: how much a file holds is known before anything of it is unpacked.

pyarrow's own view of a column's metadata ends the process where they contradict themselves, so it is not asked. The
format is Thrift's compact protocol, as parquet-format documents it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

_MAX_FOOTER = 64 << 20
_MAX_DEPTH = 16


@dataclass(frozen=True)
class ColumnSize:
    """Size of a column in a row group: its first name, its values (nulls count), and bytes before compression."""

    name: str
    values: int
    nbytes: int


def column_sizes(file: BinaryIO) -> list[list[ColumnSize]]:
    """The sizes of every column, a list a row group. Raises `ValueError` for a file with no footer that can be read."""
    file.seek(-8, 2)
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1":
        raise ValueError("the file has no footer; it was cut short, or is encrypted")
    if length > min(_MAX_FOOTER, file.seek(0, 2) - 8):
        raise ValueError("a footer larger than the file")
    file.seek(-8 - length, 2)
    groups = _Reader(file.read(length)).struct().get(4, [])
    return [[_column_size(column) for column in _field(group, 1, list)] for group in groups]


def _column_size(column: Any) -> ColumnSize:
    meta = _field(column, 3, dict)
    path = _field(meta, 3, list)
    name = path[0].decode("utf-8", "replace") if path and isinstance(path[0], bytes) else ""
    return ColumnSize(name, _field(meta, 5, int), _field(meta, 6, int))


def _field(struct: Any, number: int, kind: type) -> Any:
    found = struct.get(number) if isinstance(struct, dict) else None
    if not isinstance(found, kind):
        raise ValueError("a footer that is broken")
    return found


class _Reader:
    """Values of Thrift's compact protocol: structs become dicts by field number; strings stay bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > _MAX_DEPTH:
            raise ValueError("a footer that is broken")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # a boolean field is its own value
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._varint())
        if kind in (9, 10):
            return self._list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a footer that is broken")  # maps do not occur in it

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._varint()
        if count > len(self.data) - self.at:
            raise ValueError("a footer that is broken")
        if head & 15 in (1, 2):
            return [self._byte() for _ in range(count)]
        return [self._value(head & 15, depth) for _ in range(count)]

    def _byte(self) -> int:
        return self._bytes(1)[0]

    def _bytes(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise ValueError("a footer that is broken")
        self.at += count
        return self.data[self.at - count : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 63:
                return value

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
