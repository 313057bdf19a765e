"""Weights as the compressed-tensors library stores them: FP8 and int8 with scales, and integers packed into words.

Packed (`pack-quantized`): `weight_packed` int32 [rows, columns · bits / 32], unsigned with half of their range added,
the first in the lowest bits; `weight_scale` [rows, groups], one for each row and group of columns; `weight_shape`.
FP4 (`mxfp4-pack-quantized`, `nvfp4-pack-quantized`) has uint8 in the place of words, and NVFP4 `weight_global_scale`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.fp4 import packed_fp4
from rac_engine.checkpoint.header import Quantized, TensorInfo
from rac_engine.checkpoint.quantized import Format, misfit, partner, plain_dtype
from rac_engine.checkpoint.scaled import block_of, find_scaled
from rac_engine.checkpoint.tensors import read_tensor
from rac_kernels import INT4_NUMBERS, dequantize_blocks, dequantize_codes

_PACKED, _SCALE, _SHAPE = "_packed", "_scale", "_shape"  # behind a weight's name

_HALF_BYTE, _BYTE = 4, 8  # bits of a packed integer

_FORMATS = (
    *("float-quantized", "int-quantized", "naive-quantized"),
    *("pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"),
)


@dataclass(frozen=True)
class PackedIntegers(Quantized):
    """Integers of `bits` packed into words [rows, columns · bits / 32], with scales [rows, groups]."""

    packed: TensorInfo
    scales: TensorInfo
    shape: TensorInfo | None
    """[2], where it is in the files: the shape, which the others show as well"""
    bits: int

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        beside = () if self.shape is None else (self.shape,)
        return self.packed, self.scales, *beside

    @property
    def unit(self) -> int:
        return 1

    def read(self, first: int, last: int, out: Tensor) -> None:
        codes = read_tensor(self.packed, (first, last)).view(torch.uint8)
        scales = read_tensor(self.scales, (first, last))
        if self.bits == _HALF_BYTE:
            dequantize_codes(codes, INT4_NUMBERS, scales, out)
        else:
            group = out.shape[1] // scales.shape[1]
            dequantize_blocks(codes.bitwise_xor_(1 << (_BYTE - 1)).view(torch.int8), scales, (1, group), out)


def compressed_format(quantization: Mapping[str, Any]) -> Format | None:
    """What is read of `quant_method: compressed-tensors`; None for anything else.

    Not read are sparse weights, weights with zero points, and those that are rotated (`transform_config`).
    """
    groups = quantization.get("config_groups")
    if quantization.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping):
        return None
    parts = [group for group in groups.values() if isinstance(group, Mapping)]
    weights = [part.get("weights") for part in parts]
    formats = [quantization.get("format"), *(part.get("format") for part in parts)]
    sparse = quantization.get("sparsity_config") or {}
    dense = isinstance(sparse, Mapping) and sparse.get("format", "dense") == "dense"
    known = all(form in (None, "mixed-precision", *_FORMATS) for form in formats)
    if quantization.get("transform_config") or not dense or not known:
        return None
    symmetric = all(isinstance(each, Mapping) and each.get("symmetric", True) is True for each in weights)
    return _described(weights) if weights and symmetric else None


def _described(weights: list[Any]) -> Format | None:
    """The format of groups of weights that are known to be symmetric."""
    kinds, sizes, packed = [], list[object](), set[int]()
    for each in weights:
        bits, kind = each.get("num_bits"), {"float": "FP", "int": "int"}.get(str(each.get("type", "int")))
        if type(bits) is not int or kind is None or bits not in (_HALF_BYTE, _BYTE):
            return None
        if kind == "int":
            packed.add(bits)
        sizes.append(each.get("block_structure"))
        strategy, group = each.get("strategy"), each.get("group_size")
        grouped = dict.fromkeys(("group", "tensor_group"), f"{group} columns of a row")
        shared = {"channel": "row", "block": "block", **grouped}.get(str(strategy), "tensor")
        kinds.append(f"{kind}{bits} with a scale for each {shared}")
    if len(packed) > 1:
        return None
    block = next((found for found in map(block_of, sizes) if found is not None), None)
    words = " and ".join(dict.fromkeys(kinds))
    return Format(words, functools.partial(_find, block=block, bits=next(iter(packed), _HALF_BYTE)))


def _find(tensors: Mapping[str, TensorInfo], block: tuple[int, int] | None, bits: int) -> Iterator[TensorInfo]:
    return itertools.chain(find_scaled(tensors, block), _find_packed(tensors, bits))


def _find_packed(tensors: Mapping[str, TensorInfo], bits: int) -> Iterator[TensorInfo]:
    """Each `NAME_packed` and what belongs to it as a tensor `NAME`."""
    for packed in tensors.values():
        name = packed.name.removesuffix(_PACKED)
        if name == packed.name:
            continue
        for beside in ("_zero_point", "_g_idx"):
            if name + beside in tensors:
                raise BadInput(
                    f"{packed.file.parent}: tensor {name + beside!r}: packed integers with zero points, or with groups "
                    "that are not in the columns' order, are not read; prune the bf16 model"
                )
        scales = partner(tensors, packed, name + _SCALE)
        if packed.dtype == torch.uint8:
            yield packed_fp4(packed, name, scales, tensors.get(f"{name}_global_scale"), divides=True)
            continue
        columns = packed.shape[-1] * 32 // bits if packed.shape else 0
        fits = (
            (packed.dtype, len(packed.shape), len(scales.shape)) == (torch.int32, 2, 2)
            and scales.dtype in (torch.float32, torch.bfloat16, torch.float16)
            and scales.shape[0] == packed.shape[0]
            and scales.shape[1] > 0
            and columns % scales.shape[1] == 0
        )
        if not fits:
            raise misfit(packed, scales, f"in groups of columns, {32 // bits} in a word")
        shape, dtype = (packed.shape[0], columns), plain_dtype(scales)
        made = PackedIntegers(packed, scales, tensors.get(name + _SHAPE), bits)
        yield replace(
            packed, name=name, shape=shape, dtype=dtype, nbytes=math.prod(shape) * dtype.itemsize, quantized=made
        )
