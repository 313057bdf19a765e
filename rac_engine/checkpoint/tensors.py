"""Tensors read from the bytes of safetensors files, and seen as bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rac_engine.base.files import PIECE, opened, pages, pieces, read_into
from rac_engine.checkpoint.header import TensorInfo
from rac_kernels import all_finite


def read_tensor(info: TensorInfo, rows: tuple[int, int] | None = None, pin: bool = False) -> torch.Tensor:
    """The tensor, or a range of its rows, read from its file into memory of its own (see `pages`)."""
    first, shape = 0, info.shape
    if rows is not None:
        first, shape = rows[0], (rows[1] - rows[0], *info.shape[1:])
    nbytes = math.prod(shape) * info.dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=info.dtype)
    memory = pages(nbytes, pin)
    tensor = torch.frombuffer(memory, dtype=info.dtype).view(shape)
    if info.quantized is not None:
        info.quantized.read(first, first + shape[0], tensor)
        return tensor
    with opened(info.file) as fd:
        read_into(fd, info.file, info.offset + first * math.prod(shape[1:]) * info.dtype.itemsize, memoryview(memory))
    return tensor


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def pieces_of(info: TensorInfo) -> Iterator[memoryview]:
    """A tensor's bytes run by run, as the numbers that they stand for; never much more than a run is in memory."""
    if info.quantized is None:
        yield from pieces(info.file, info.offset, info.nbytes)
        return
    rows, unit = info.shape[0], info.quantized.unit
    step = max(PIECE * rows // max(info.nbytes, 1) // unit, 1) * unit
    for first in range(0, rows, step):
        yield bytes_of(read_tensor(info, (first, min(first + step, rows))))


def is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether a run of a tensor's bytes holds no NaN and no Inf."""
    if not len(data):
        return True
    return all_finite(torch.frombuffer(data, dtype=dtype))
