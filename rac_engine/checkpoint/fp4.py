"""Weights in FP4, in groups with a scale each: MXFP4 (32 numbers, a power of two) and NVFP4 (16, an FP8 number).

- `quant_method: mxfp4`: experts stacked and transposed, as OpenAI publishes gpt-oss.
- NVFP4, and MXFP4 in single matrices, as `modelopt` and `compressed-tensors` write them: two numbers in a byte
  [rows, columns / 2], scales [rows, columns / group], and for NVFP4 one more scale for the whole tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rac_engine.checkpoint.header import Quantized, TensorInfo
from rac_engine.checkpoint.quantized import Format, misfit, partner
from rac_engine.checkpoint.scaled import find_scaled
from rac_engine.checkpoint.tensors import read_tensor
from rac_kernels import FP4_NUMBERS, dequantize_codes, powers_of_two

_BLOCKS, _SCALES = "_blocks", "_scales"  # behind a weight's name

_GROUP_BYTES = 16  # 32 numbers


@dataclass(frozen=True)
class TransposedExperts(Quantized):
    """`blocks` [experts, rows, columns / 32, 16] that are read as [experts, columns, rows]: transformers' bf16 form."""

    blocks: TensorInfo
    scales: TensorInfo
    """uint8 [experts, rows, columns / 32], exponents of two"""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return self.blocks, self.scales

    @property
    def unit(self) -> int:
        return 1

    def read(self, first: int, last: int, out: Tensor) -> None:
        for expert, made in zip(range(first, last), out, strict=True):
            here = (expert, expert + 1)
            codes = read_tensor(self.blocks, here)[0].flatten(1)
            dequantize_codes(codes, FP4_NUMBERS, powers_of_two(read_tensor(self.scales, here)[0]), made.T)


@dataclass(frozen=True)
class PackedFP4(Quantized):
    """A matrix of which two numbers lie in a byte [rows, columns / 2]."""

    codes: TensorInfo
    scales: TensorInfo
    """[rows, groups]: exponents of two in uint8, or FP8 numbers"""
    whole: TensorInfo | None
    """A number for all groups"""
    divides: bool
    """Whether the scales are divided by it rather than multiplied."""

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.codes, self.scales) if self.whole is None else (self.codes, self.scales, self.whole)

    @property
    def unit(self) -> int:
        return 1

    def read(self, first: int, last: int, out: Tensor) -> None:
        scales, factor = read_tensor(self.scales, (first, last)), 1.0
        if self.whole is not None:
            factor = float(read_tensor(self.whole))
            factor = factor if not self.divides else 1 / factor if factor else torch.inf
        wide = powers_of_two(scales) if scales.dtype == torch.uint8 else scales
        dequantize_codes(read_tensor(self.codes, (first, last)), FP4_NUMBERS, wide, out, factor)


def nvfp4_format(quantization: Mapping[str, Any]) -> Format | None:
    """NVFP4 as NVIDIA's Model Optimizer writes it, with FP8 beside it; None for anything else."""
    if quantization.get("quant_method") != "modelopt" or quantization.get("quant_algo") != "NVFP4":
        return None
    return Format("NVFP4", _find_nvfp4)


def _find_nvfp4(tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    """Each `weight` in uint8 with `weight_scale` and `weight_scale_2`, and those in FP8."""
    yield from find_scaled(tensors)
    for codes in tensors.values():
        whole = tensors.get(f"{codes.name}_scale_2")
        if codes.dtype == torch.uint8 and whole is not None:
            yield packed_fp4(codes, codes.name, partner(tensors, codes, f"{codes.name}_scale"), whole, divides=False)


def packed_fp4(codes: TensorInfo, name: str, scales: TensorInfo, whole: TensorInfo | None, divides: bool) -> TensorInfo:
    """The tensor `name` that `codes` stand for with `scales`, and with a `whole` one for NVFP4."""
    group = 32 if whole is None else 16
    columns = 2 * codes.shape[-1] if codes.shape else 0
    kind = torch.uint8 if whole is None else torch.float8_e4m3fn
    fits = len(codes.shape) == 2 and codes.dtype == torch.uint8 and columns % group == 0
    if not fits or scales.shape != (codes.shape[0], columns // group) or scales.dtype != kind:
        raise misfit(codes, scales, f"in groups of {group}")
    if whole is not None and (math.prod(whole.shape) != 1 or whole.dtype != torch.float32):
        raise misfit(codes, whole, "as a whole")
    dtype = torch.bfloat16
    made = PackedFP4(codes, scales, whole, divides)
    nbytes = 2 * codes.nbytes * dtype.itemsize
    return replace(codes, name=name, shape=(codes.shape[0], columns), dtype=dtype, nbytes=nbytes, quantized=made)


def mxfp4_format(quantization: Mapping[str, Any]) -> Format | None:
    """The format of `quant_method: mxfp4`; None for anything else."""
    return Format("MXFP4", _find) if quantization.get("quant_method") == "mxfp4" else None


def _find(tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    """Each pair `NAME_blocks` and `NAME_scales` as a tensor `NAME`."""
    for blocks in tensors.values():
        if not blocks.name.endswith(_BLOCKS) or blocks.dtype != torch.uint8:
            continue
        name = blocks.name.removesuffix(_BLOCKS)
        scales = partner(tensors, blocks, name + _SCALES)
        fits = len(blocks.shape) == 4 and blocks.shape[3] == _GROUP_BYTES and scales.shape == blocks.shape[:3]
        if not fits or scales.dtype != torch.uint8:
            raise misfit(blocks, scales, f"in groups of {2 * _GROUP_BYTES}")
        experts, rows, groups, size = blocks.shape
        shape, dtype = (experts, 2 * size * groups, rows), torch.bfloat16
        nbytes = 2 * blocks.nbytes * dtype.itemsize
        made = TransposedExperts(blocks, scales)
        yield replace(blocks, name=name, shape=shape, dtype=dtype, nbytes=nbytes, quantized=made)
