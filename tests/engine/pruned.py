"""Tiny checkpoints with zeros in the matrices of their layers, without a pruning."""

from __future__ import annotations

from pathlib import Path

import torch

from rac_engine.checkpoint.reader import Checkpoint
from rac_engine.models.model import Model
from rac_kernels import pack as pack_matrix
from rac_kernels import unpack as unpack_matrix
from tests import tiny


def pruned(folder: Path, family: str = "qwen2", share: float = 0.6, grid: bool = False) -> Path:
    """A checkpoint in shards of which the matrices in the layers have zeros; on a grid of int4 if asked for."""
    checkpoint = Checkpoint.open(tiny.save(folder, family))
    for name in {matrix.tensor for matrix in Model.open(checkpoint).prunable()}:
        info = checkpoint.tensors[name]
        W = checkpoint.read(name)
        W = W.masked_fill(torch.rand(W.shape, generator=torch.Generator().manual_seed(0)) < share, 0)
        W = unpack_matrix(pack_matrix(W, "int4")) if grid else W
        with info.file.open("r+b") as file:
            file.seek(info.offset)
            file.write(W.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return folder
