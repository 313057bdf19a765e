"""The size of a job's output in packed form, from shapes alone."""

from __future__ import annotations

from collections.abc import Collection

import torch

from rac_engine.models import Matrix, Model
from rac_engine.recipe import PruneSettings
from rac_kernels import packed_size


def packed_bytes(model: Model, settings: PruneSettings, skipped: Collection[str]) -> int:
    """About as many bytes as all tensors take once the output is packed; `skipped` matrices stay dense.

    That the sparsity is allocated is left out: in the sum it makes no difference to what is kept.
    """
    tensors = model.checkpoint.tensors
    total = sum(info.nbytes for info in tensors.values())
    found: dict[str, list[Matrix]] = {}
    for matrix in model.prunable():
        found.setdefault(matrix.tensor, []).append(matrix)
    for name, matrices in found.items():
        info = tensors[name]
        if info.dtype not in (torch.bfloat16, torch.float16, torch.float32) or len(info.shape) not in (2, 3):
            continue
        # The solver's grid goes along a row of the matrix, packing along a row of the tensor.
        off_grid = any(matrix.name in skipped or matrix.transposed for matrix in matrices)
        kept = sum(_kept(matrix, settings, matrix.name in skipped) for matrix in matrices)
        size = packed_size(info.shape, round(kept), info.dtype, "same" if off_grid else settings.values)
        total -= max(info.nbytes - size, 0)
    return total


def _kept(matrix: Matrix, settings: PruneSettings, dense: bool) -> float:
    share = 1.0 if dense else 1 - settings.of(matrix.path, matrix.module).sparsity
    return share * matrix.rows * matrix.columns
