"""Records of Parquet and Arrow files, by row groups and by the columns that are read, in bounded memory.

A file of a few kilobytes can hold gigabytes, by values that repeat. What a file claims is looked at before it is
unpacked; text stays in its dictionary until its row is read.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rac_engine.base.errors import BadInput
from rac_engine.base.sizes import format_bytes
from rac_engine.traces.footer import ColumnSize, column_sizes

_GROUP = 4 << 30  # bytes in a row group of a Parquet file, at most

_BATCH = 1 << 30  # bytes that 256 rows take, at most

_ROWS = 256

_VALUE = 8  # bytes of a value, at least those of a token id

_HONEST = 256 << 20  # bytes that any file may hold, however small it is, and

_RATIO = 1000  # how often its own size a file may hold beyond that

Records = Iterator[tuple[str, dict[str, Any]]]


def from_parquet(file: Path, wanted: Collection[str]) -> Records:
    """("FILE: row N", record) of every row of a Parquet file, with the columns `wanted` (by their plain names)."""
    try:
        with file.open("rb") as stream:
            sizes = column_sizes(stream)
        texts = _text_columns(file)
        with pq.ParquetFile(file, read_dictionary=texts) as reader:
            _refuse_large_groups(reader.metadata)
            names = _chosen(reader.schema_arrow.names, wanted, file)
            _refuse_bombs(sizes, set(names), file.stat().st_size)
            row = 0
            for batch in reader.iter_batches(_ROWS, columns=names):
                yield from _records(batch, file, row)
                row += batch.num_rows
    except BadInput:
        raise
    except Exception as error:  # whatever Arrow finds wrong with a file
        raise _broken(file, "Parquet", error) from None


def from_arrow(file: Path, wanted: Collection[str]) -> Records:
    """("FILE: row N", record) of every row of an Arrow file or stream, as `datasets` saves them to disk."""
    try:
        with pa.OSFile(str(file)) as stream:
            head = stream.read(6)
            stream.seek(0)
            if head == b"ARROW1":
                reader = pa.ipc.open_file(stream)
                names = _chosen(reader.schema.names, wanted, file)
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                reader = pa.ipc.open_stream(stream)
                names = _chosen(reader.schema.names, wanted, file)
                batches = iter(reader)
            row = 0
            for batch in batches:
                batch.validate(full=True)  # offsets of strangers
                kept = batch.select(names)
                for at in range(0, kept.num_rows, _ROWS):
                    yield from _records(kept.slice(at, _ROWS), file, row + at)
                row += batch.num_rows
    except BadInput:
        raise
    except Exception as error:
        raise _broken(file, "Arrow", error) from None


def _broken(file: Path, kind: str, error: Exception) -> BadInput:
    reason = " ".join(str(error).split())[:200]
    return BadInput(f"{file}: not a {kind} file that can be read ({reason}); fetch it again")


def _text_columns(file: Path) -> list[str]:
    """Paths of the columns with text, which are read as dictionaries: a text that repeats takes its place once."""
    schema = pq.read_schema(file)
    found: list[str] = []

    def walk(kind: pa.DataType, path: str) -> None:
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            found.append(path)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            walk(kind.value_type, f"{path}.list.{kind.value_field.name}")
        elif pa.types.is_struct(kind):
            for number in range(kind.num_fields):
                walk(kind.field(number).type, f"{path}.{kind.field(number).name}")

    for field in schema:
        walk(field.type, field.name)
    return found


def _chosen(names: list[str], wanted: Collection[str], file: Path) -> list[str]:
    """The columns to read; `BadInput` that names those there are if there is none."""
    chosen = [name for name in names if name.strip().lower().replace(" ", "_") in wanted or name in wanted]
    if not chosen:
        raise BadInput(
            f"{file}: none of its columns is known, which are {', '.join(map(repr, names[:20])) or 'none'}; name one "
            "with --column problem=NAME"
        )
    return chosen


def _refuse_large_groups(metadata: Any) -> None:
    if any(metadata.row_group(index).total_byte_size > _GROUP for index in range(metadata.num_row_groups)):
        raise ValueError(f"a row group larger than {format_bytes(_GROUP)}")


def _refuse_bombs(sizes: list[list[ColumnSize]], names: set[str], nbytes: int) -> None:
    """`ValueError` for a row group that would hold far more than a file of `nbytes` can in earnest."""
    most = max(_HONEST, _RATIO * nbytes)
    for group in sizes:
        for column in group:
            if column.name in names and max(column.values * _VALUE, column.nbytes) > most:
                raise ValueError(
                    f"its column {column.name!r} holds {column.values:,} values in a file of {format_bytes(nbytes)}"
                )


def _records(batch: pa.RecordBatch, file: Path, row: int) -> Records:
    """The rows of a batch, unpacked in parts that fit into memory."""
    size = sum(_unpacked(column) for column in batch.columns)
    if size > _BATCH:
        if batch.num_rows == 1 or batch.nbytes > _BATCH:
            raise ValueError(f"rows of more than {format_bytes(_BATCH)}")
        half = batch.num_rows // 2
        yield from _records(batch.slice(0, half), file, row)
        yield from _records(batch.slice(half), file, row + half)
        return
    columns = [column.to_pylist() for column in batch.columns]
    for number, values in enumerate(zip(*columns, strict=True), row + 1):
        yield f"{file}: row {number}", dict(zip(batch.schema.names, values, strict=True))


def _unpacked(array: Any) -> int:
    """Bytes of an array once its dictionaries are unpacked."""
    if isinstance(array, pa.DictionaryArray):
        lengths = pc.binary_length(array.dictionary)
        return int(pc.sum(pc.take(lengths, array.indices)).as_py() or 0)
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        return int(array.nbytes) + _unpacked(array.flatten())
    if isinstance(array, pa.StructArray):
        return sum(_unpacked(part) for part in array.flatten())
    return int(array.nbytes)
