"""Tensors read from the bytes of safetensors files, and seen as bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from rac_engine.base.files import PIECE, opened, pages, pieces, read_into
from rac_engine.checkpoint.header import TensorInfo
from rac_kernels import all_finite, dequantize_blocks


def read_tensor(info: TensorInfo, rows: tuple[int, int] | None = None, pin: bool = False) -> torch.Tensor:
    """The tensor, or a range of its rows, read from its file into memory of its own (see `pages`)."""
    first, shape = 0, info.shape
    if rows is not None:
        first, shape = rows[0], (rows[1] - rows[0], *info.shape[1:])
    dtype = info.dtype if info.scaled is None else info.scaled.dtype
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=info.dtype)
    memory = pages(nbytes, pin and info.scaled is None)
    offset = info.offset + first * math.prod(shape[1:]) * dtype.itemsize
    with opened(info.file) as fd:
        read_into(fd, info.file, offset, memoryview(memory))
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    if info.scaled is None:
        return tensor
    made = torch.frombuffer(pages(math.prod(shape) * info.dtype.itemsize, pin), dtype=info.dtype).view(shape)
    return dequantize_blocks(tensor, read_tensor(info.scaled.scales), info.scaled.block, made, first)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def pieces_of(info: TensorInfo) -> Iterator[memoryview]:
    """A tensor's bytes run by run, FP8 as the bf16 that it stands for; never much more than a run is in memory."""
    if info.scaled is None:
        yield from pieces(info.file, info.offset, info.nbytes)
        return
    rows = info.shape[0]
    block = info.scaled.block[0]
    # Whole blocks of rows, so that none is multiplied in two parts.
    step = max(PIECE * rows // max(info.nbytes, 1) // block, 1) * block
    for first in range(0, rows, step):
        yield bytes_of(read_tensor(info, (first, min(first + step, rows))))


def is_finite(data: memoryview, dtype: torch.dtype) -> bool:
    """Whether a run of a tensor's bytes holds no NaN and no Inf."""
    if not len(data):
        return True
    return all_finite(torch.frombuffer(data, dtype=dtype))
