"""MXFP4 as OpenAI publishes gpt-oss: experts stacked, FP4 numbers in groups of 32 with a power of two each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rac_engine.checkpoint.header import Quantized, TensorInfo
from rac_engine.checkpoint.quantized import Format, misfit, partner
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
