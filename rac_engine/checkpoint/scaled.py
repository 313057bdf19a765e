"""Weights in FP8 or int8 with a scale for each block, row or tensor.

- `quant_method: fp8`: `weight` and `weight_scale_inv` [⌈rows / block⌉, ⌈columns / block⌉] (DeepSeek, Qwen, MiniMax), or
  a scale for the whole tensor; experts stacked in one tensor have such scales each.
- `quant_method: compressed-tensors` (float-quantized, int-quantized) and `modelopt` (FP8): `weight` and `weight_scale`,
  for each row, for the whole tensor or for blocks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rac_engine.checkpoint.header import Quantized, TensorInfo
from rac_engine.checkpoint.quantized import Format, misfit, plain_dtype
from rac_engine.checkpoint.tensors import read_tensor
from rac_kernels import dequantize_blocks


@dataclass(frozen=True)
class ScaledBlocks(Quantized):
    """Values [rows, columns], or a stack of such matrices, of which each block is multiplied by one number."""

    values: TensorInfo
    scales: TensorInfo
    """⌈rows / block rows⌉ · ⌈columns / block columns⌉ of each matrix."""
    block: tuple[int, int]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.values, self.scales

    @property
    def unit(self) -> int:
        stacked = len(self.values.shape) > 2
        return 1 if stacked or self.block[0] >= self.values.shape[0] else self.block[0]

    def read(self, first: int, last: int, out: Tensor) -> None:
        rows, columns = self.values.shape[-2:]
        grid = (-(-rows // self.block[0]), -(-columns // self.block[1]))
        scales = read_tensor(self.scales)
        if len(self.values.shape) == 2:
            dequantize_blocks(read_tensor(self.values, (first, last)), scales.view(grid), self.block, out, first)
            return
        for number, each in zip(range(first, last), scales.view(-1, *grid)[first:last], strict=True):
            dequantize_blocks(read_tensor(self.values, (number, number + 1))[0], each, self.block, out[number - first])


def fp8_format(quantization: Mapping[str, Any]) -> Format | None:
    """FP8 under `quant_method: fp8`, with scales of blocks or of whole tensors; None for anything else."""
    if quantization.get("quant_method") != "fp8":
        return None
    if (block := block_of(quantization.get("weight_block_size"))) is not None:
        words = f"FP8 with a scale for each {block[0]} × {block[1]}"
        return Format(words, functools.partial(_find, suffixes=("_scale_inv",), block=block, blocks_only=True))
    if quantization.get("weight_block_size") is None and quantization.get("activation_scheme") in ("static", "dynamic"):
        return Format("FP8 with a scale for each tensor", functools.partial(_find, suffixes=("_scale_inv", "_scale")))
    return None


def modelopt_format(quantization: Mapping[str, Any]) -> Format | None:
    """FP8 as NVIDIA's Model Optimizer writes it; None for anything else."""
    if quantization.get("quant_method") != "modelopt" or quantization.get("quant_algo") != "FP8":
        return None
    return Format("FP8 with a scale for each tensor", find_scaled)


def block_of(sizes: object) -> tuple[int, int] | None:
    """Rows and columns of a block, as a config.json says it in a list; None if that makes no sense."""
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    return None


def find_scaled(tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None = None) -> Iterator[TensorInfo]:
    """The weights in FP8 or int8 that have a `weight_scale` for each row or tensor, or for each `block`."""
    return _find(tensors, ("_scale",), block)


def _find(
    tensors: Mapping[str, TensorInfo],
    suffixes: tuple[str, ...],
    block: tuple[int, int] | None = None,
    blocks_only: bool = False,
) -> Iterator[TensorInfo]:
    """The weights whose scales are called like them, with one of the `suffixes` behind."""
    why = "in blocks of {} × {}".format(*block) if block is not None else "by row or as a whole"
    dtypes = (torch.float32, torch.bfloat16) if blocks_only else (torch.float32, torch.bfloat16, torch.float16)
    for info in tensors.values():
        scales = next((tensors[info.name + suffix] for suffix in suffixes if info.name + suffix in tensors), None)
        if scales is None or info.dtype not in (torch.float8_e4m3fn, torch.int8):
            continue
        known = {} if len(info.shape) not in (2, 3) else _blocks(info.shape, block, blocks_only)
        if scales.shape not in known or scales.dtype not in dtypes:
            raise misfit(info, scales, why)
        dtype = plain_dtype(scales)
        nbytes = math.prod(info.shape) * dtype.itemsize
        blocks = ScaledBlocks(info, scales, known[scales.shape])
        yield replace(info, dtype=dtype, nbytes=nbytes, quantized=blocks)


def _blocks(
    shape: tuple[int, ...], block: tuple[int, int] | None, blocks_only: bool
) -> dict[tuple[int, ...], tuple[int, int]]:
    """By the shape of the scales: rows and columns that share one, in matrices or stacks of them of that shape."""
    (rows, columns), stack = shape[-2:], shape[:-2]
    whole, by_row = (max(rows, 1), max(columns, 1)), (1, max(columns, 1))
    known = dict[tuple[int, ...], tuple[int, int]]()
    if not blocks_only:
        known |= {stack: whole, (*stack, 1): whole, (*stack, 1, 1): whole, (*stack, rows, 1): by_row}
        known |= {} if stack else {(rows,): by_row}
    if block is not None:
        known[*stack, -(-rows // block[0]), -(-columns // block[1])] = block
    return known
