"""Records of a file in any format known, told by its first bytes: JSONL, JSON, CSV, packed or not, Parquet, Arrow."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rac_engine.base.errors import BadInput
from rac_engine.base.jsonfiles import DECODER, loads
from rac_engine.traces.tables import Records, from_arrow, from_parquet

SUFFIXES = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
PACKED = (".gz", ".zst", ".bz2", ".xz")

_MAX_LINE = 16 << 20

_MAX_OBJECT = 64 << 20  # bytes of a file that is one JSON object

_ROWS_OF_OBJECT = ("data", "rows", "records", "examples", "problems", "prompts", "questions", "train", "test")

_STRANGE = (
    (b"PK\x03\x04", "a zip archive", "unpack it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it"),
    (b"\x80\x02", "a pickle, which is never loaded", "save its rows as JSONL or Parquet"),
    (b"\x80\x03", "a pickle, which is never loaded", "save its rows as JSONL or Parquet"),
    (b"\x80\x04", "a pickle, which is never loaded", "save its rows as JSONL or Parquet"),
    (b"\x80\x05", "a pickle, which is never loaded", "save its rows as JSONL or Parquet"),
    (b"SQLite format 3", "an SQLite database", "save its rows as JSONL or Parquet"),
    (b"\x89HDF", "an HDF5 file", "save its rows as JSONL or Parquet"),
    (b"%PDF", "a PDF", "give JSONL or Parquet"),
    (b"PARE", "an encrypted Parquet file", "save it without encryption"),
    (b"\xff\xfe\0\0", "text in UTF-32", "save it as UTF-8"),
    (b"\0\0\xfe\xff", "text in UTF-32", "save it as UTF-8"),
    (b"version https://git-lfs", "the pointer of a file that Git LFS has not fetched", "run `git lfs pull`"),
    (b"<!DOCTYPE", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
)


def records_in(file: Path, wanted: Collection[str]) -> Records:
    """(where, record) of every record of a file; of a table the columns `wanted` alone, by their plain names.

    `where` is "FILE:LINE" of JSONL and "FILE: row N" of a table. Raises `BadInput`, which says what a file is that
    cannot be read, and names the first record that is broken.
    """
    try:
        with file.open("rb") as stream:
            head = stream.peek(24)[:24]
            if head.startswith(b"PAR1"):
                yield from from_parquet(file, wanted)
            elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
                yield from from_arrow(file, wanted)
            else:
                yield from _from_text(_unpacked(stream, head, file), file)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file}: no text in {error.encoding} ({error.reason}); save it as UTF-8") from None
    except (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        raise BadInput(f"{file}: is packed, and broken ({error}); fetch it again") from None
    except OSError as error:
        if error.strerror is None:  # as pyarrow tells of what it cannot unpack
            raise BadInput(f"{file}: is packed, and broken ({error}); fetch it again") from None
        raise BadInput(f"{file}: {error.strerror}; give a JSONL or Parquet file") from None


def _unpacked(stream: BinaryIO, head: bytes, file: Path) -> io.BufferedReader:
    """What a packed file holds, or the file itself; `BadInput` for one that is none of text."""
    inside: Any = stream
    if head.startswith(b"\x1f\x8b"):
        inside = gzip.GzipFile(fileobj=stream)
    elif head.startswith(b"BZh"):
        inside = bz2.BZ2File(stream)
    elif head.startswith(b"\xfd7zXZ"):
        inside = lzma.open(stream)  # noqa: SIM115 - the stream outlives this
    elif head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa

        inside = pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd")
    if inside is not stream:
        inside = io.BufferedReader(inside)
        head = inside.peek(24)[:24]
        if head.startswith((b"PAR1", b"ARROW1")):
            raise BadInput(f"{file}: a table that was packed once more; unpack it")
    for magic, what, mend in _STRANGE:
        if head.startswith(magic):
            raise BadInput(f"{file}: is {what}; {mend}")
    return inside


def _from_text(stream: io.BufferedReader, file: Path) -> Records:
    head = stream.peek(4)[:4]
    encoding = "utf-8"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif head[:1] in (b"{", b"[") and head[1:2] == b"\0":
        encoding = "utf-16-le"
    elif head.startswith(codecs.BOM_UTF8):
        stream.read(3)
        head = stream.peek(4)[:4]
    if (suffix := _suffix(file)) in (".csv", ".tsv"):
        yield from _from_csv(io.TextIOWrapper(stream, encoding, newline=""), file, "\t" if suffix == ".tsv" else ",")
    elif head.replace(b"\0", b"").lstrip(b"\xff\xfe \r\n\t")[:1] == b"[":
        yield from _from_array(io.TextIOWrapper(stream, encoding), file)
    else:
        yield from _from_lines(_lines(stream, encoding), file)


def _suffix(file: Path) -> str:
    """What a file's name ends with, below the ending of what it is packed with."""
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def _lines(stream: io.BufferedReader, encoding: str) -> Iterator[bytes]:
    """Lines in UTF-8, each of `_MAX_LINE` + 1 bytes at most."""
    if encoding == "utf-8":
        return iter(lambda: stream.readline(_MAX_LINE + 1), b"")
    text = io.TextIOWrapper(stream, encoding, newline="\n")
    return (line.encode() for line in iter(lambda: text.readline(_MAX_LINE + 1), ""))


def _from_lines(lines: Iterator[bytes], file: Path) -> Records:
    """Records of JSONL, or of a file that is one object over many lines."""
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        if len(line) > _MAX_LINE:
            raise BadInput(f"{where}: the line is longer than 16 MiB; is this a JSONL file?")
        if not line.strip():
            continue
        try:
            value = loads(line.rstrip())
        except json.JSONDecodeError as error:
            if number == 1 and (whole := _whole_object(line, lines)) is not None:
                yield from _rows_of(whole, str(file))
                return
            place = f"{where}:{error.colno}"
            raise BadInput(f"{place}: not valid JSON ({error.msg}); mend or remove the line") from None
        except (ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{where}: not valid JSON ({reason}); mend or remove the line") from None
        if not isinstance(value, dict):
            raise BadInput(f'{where}: should be a JSON object such as {{"problem": …}}')
        yield from _rows_of(value, where)


def _whole_object(first: bytes, lines: Iterator[bytes]) -> dict[str, Any] | None:
    """The object that a file is which begins with this line; None if it is none."""
    text = bytearray(first)
    for line in lines:
        text += line
        if len(text) > _MAX_OBJECT:
            return None
    try:
        value = loads(bytes(text))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _rows_of(value: dict[str, Any], where: str) -> Records:
    """A record, or the records that it is only the wrapping of, as in {"data": […]}."""
    for name in _ROWS_OF_OBJECT:
        rows = value.get(name)
        if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) and "role" not in rows[0]:
            for number, row in enumerate(rows):
                inner = row.get("row")  # of the hub's own viewer
                yield f"{where}: {name}[{number}]", inner if isinstance(inner, dict) else row
            return
    yield where, value


def _from_array(text: io.TextIOWrapper, file: Path) -> Records:
    """Records of a JSON array, one at a time."""
    buffer, at, number = text.read(_MAX_LINE).lstrip("\ufeff \r\n\t")[1:], 0, 0
    ended = False
    while True:
        while at < len(buffer) and buffer[at] in " \r\n\t,":
            at += 1
        if at == len(buffer) and not ended:
            buffer, at = text.read(1 << 20), 0
            ended = not buffer
            continue
        if at == len(buffer) or buffer[at] == "]":
            if at == len(buffer):
                raise BadInput(f"{file}: a JSON array that does not end; it was cut short, fetch it again")
            return
        where = f"{file}: record {number + 1}"
        try:
            value, at = DECODER.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError) and not ended and len(buffer) - at <= _MAX_LINE:
                more = text.read(1 << 20)
                buffer, at, ended = buffer[at:] + more, 0, not more
                continue
            reason = " ".join(str(error).split())[:200]
            raise BadInput(f"{where}: not valid JSON ({reason}); mend or remove it") from None
        if not isinstance(value, dict):
            raise BadInput(f'{where}: should be a JSON object such as {{"problem": …}}')
        number += 1
        yield where, value


def _from_csv(text: io.TextIOWrapper, file: Path, delimiter: str) -> Records:
    """Records of a table in text, whose first line names its columns; an empty cell is absent."""
    before = csv.field_size_limit(_MAX_LINE)
    try:
        rows = csv.DictReader(text, delimiter=delimiter, strict=True)
        for number, row in enumerate(rows, 1):
            if None in row:
                raise BadInput(f"{file}: row {number} has more cells than there are columns; mend it")
            yield f"{file}: row {number}", {name: value for name, value in row.items() if value}
    except csv.Error as error:
        raise BadInput(f"{file}: not a table in CSV ({error}); mend it, or save it as JSONL") from None
    finally:
        csv.field_size_limit(before)
