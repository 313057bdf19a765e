"""Headers of safetensors files, checked before anything in them is believed."""

from __future__ import annotations

import json
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rac_engine.base.errors import BadInput
from rac_engine.base.files import opened, read_at, regular_status
from rac_engine.base.jsonfiles import loads_object, read_json_object

DTYPES_BY_NAME = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES_BY_NAME.items()}

_MAX_RANK = 64  # dimensions of a tensor: as many as torch takes

_MAX_HEADER = 100_000_000  # what the safetensors format allows

_MAX_JSON = 64 << 20

_MEND = "fetch the checkpoint again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: `nbytes` bytes from `offset` (of the file's start) in `file`."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    quantized: Quantized | None = None
    """Set where the tensor lies quantized in the files; `dtype`, `shape` and `nbytes` are those that it is read in."""


class Quantized(ABC):
    """A tensor that lies in the files as other tensors, from which it is made as it is read."""

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorInfo, ...]:
        """The tensors in the files, that of the values first: the whole takes its place."""

    @property
    @abstractmethod
    def unit(self) -> int:
        """Rows (of the first dimension) that are best made together."""

    @abstractmethod
    def read(self, first: int, last: int, out: torch.Tensor) -> None:
        """Make the rows from `first` up to `last` in `out`, [last - first, …] in the dtype that they are read in."""


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in a checkpoint's config or index; anything but a file of at most 64 MiB is `BadInput`."""
    return read_json_object(file, _MAX_JSON, "give the folder of a whole Hugging Face checkpoint", _MEND)


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of a safetensors file in the order of their bytes.

    Raises `BadInput` unless the header accounts for every byte of the file exactly once.
    """
    with opened(file) as fd:
        status = regular_status(fd, file)
        size = int.from_bytes(read_at(fd, file, 0, 8), "little") if status.st_size >= 8 else -1
        if not 2 <= size <= min(_MAX_HEADER, status.st_size - 8):
            raise BadInput(f"{file}: not a safetensors file, or cut short; fetch it again")
        header = loads_object(bytes(read_at(fd, file, 8, size)), f"header of {file}", _MEND)
    start, data = 8 + size, status.st_size - 8 - size
    infos = [_tensor_info(file, start, name, entry) for name, entry in header.items() if name != "__metadata__"]
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    end = start
    for info in infos:
        if info.offset != end:
            raise BadInput(f"{file}: tensor {info.name!r} overlaps another or leaves a hole; the file is damaged")
        end += info.nbytes
    if end != start + data:
        raise BadInput(
            f"{file}: the header describes {end - start} bytes of tensors, the file has {data}; fetch it again"
        )
    return infos


def _tensor_info(file: Path, start: int, name: str, entry: Any) -> TensorInfo:
    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(x) is int and 0 <= x < 1 << 62 for x in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadInput(f"{file}: tensor {name!r} needs dtype, shape and data_offsets; the file is damaged")
    dtype = DTYPES_BY_NAME.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise BadInput(f"{file}: tensor {name!r} has dtype {entry['dtype']!r}; known are {', '.join(DTYPES_BY_NAME)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if isinstance(shape, list) and len(shape) > _MAX_RANK:
        raise BadInput(
            f"{file}: tensor {reprlib.repr(name)} has {len(shape):,} dimensions, more than {_MAX_RANK}; "
            "the file is damaged"
        )
    if not counts(shape) or not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadInput(f"{file}: tensor {name!r} has a shape or offsets that make no sense; the file is damaged")
    nbytes = offsets[1] - offsets[0]
    # Of a shape with a 0 in it, too, all sizes together have to fit: strides are products of them.
    if math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 1 << 63:
        raise BadInput(f"{file}: tensor {name!r} has a shape {shape} beyond 64 bits; the file is damaged")
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise BadInput(f"{file}: tensor {name!r} has shape {shape} but {nbytes} bytes; the file is damaged")
    return TensorInfo(name, file, dtype, tuple(shape), start + offsets[0], nbytes)


def file_layout(file: Path, infos: list[TensorInfo], room: int = 0) -> tuple[bytes, dict[str, TensorInfo]]:
    """Header of an output file, of `room` bytes at least, and the places of its tensors in it."""
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    at = 0
    for info in infos:
        offsets = [at, at := at + info.nbytes]
        entries[info.name] = {"dtype": _DTYPE_NAMES[info.dtype], "shape": info.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(room - 8)
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {
        info.name: TensorInfo(
            info.name, file, info.dtype, info.shape, start + entries[info.name]["data_offsets"][0], info.nbytes
        )
        for info in infos
    }
    return len(text).to_bytes(8, "little") + text, places
