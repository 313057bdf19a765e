"""A checkpoint written shard by shard, with tensors of sizes that are known only once they are made."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from rac_engine.base.files import disk_errors, opened, sync, write_at, write_file
from rac_engine.checkpoint import INDEX, Checkpoint, TensorInfo, bytes_of, file_layout

_SPARE = 24  # characters that a tensor's shape may take more than in the source


@dataclass(frozen=True)
class Written:
    """Bytes of all tensors that were written."""

    total: int
    sizes: Mapping[str, int]


def write_shards(checkpoint: Checkpoint, folder: Path, make: Callable[[TensorInfo], Tensor]) -> Written:
    """Write each tensor of `checkpoint` as `make` gives it, in the source's order and shards, with an index.

    The header comes first in a file, and is written last: its place is as large as it can become.
    """
    total, sizes = 0, dict[str, int]()
    for name, infos in checkpoint.shards.items():
        file = folder / name
        room = len(file_layout(file, infos)[0]) + _SPARE * len(infos)
        at, made = room, list[TensorInfo]()
        with disk_errors(file), opened(file, os.O_WRONLY | os.O_CREAT) as fd:
            for info in infos:
                tensor = make(info)
                data = bytes_of(tensor)
                write_at(fd, data, at)
                at += len(data)
                made.append(replace(info, dtype=tensor.dtype, shape=tuple(tensor.shape), nbytes=len(data)))
            header, _ = file_layout(file, made, room)
            assert len(header) == room
            write_at(fd, header, 0)
        sync(file)
        sizes |= {info.name: info.nbytes for info in made}
        total += at - room
    if (checkpoint.path / INDEX).exists():
        weight_map = {info.name: file for file, infos in checkpoint.shards.items() for info in infos}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with disk_errors(folder):
            write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return Written(total, sizes)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype and shape are equal bit for bit."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
