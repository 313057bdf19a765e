"""Block-scaled FP8 weights, presented as the bf16 that they stand for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.header import Scaled, TensorInfo

_SCALE = "_scale_inv"  # behind a weight's name: the scales of its blocks


def fp8_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, if a config.json says that the weights are block-scaled FP8; else None."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "fp8":
        return None
    block = quantization.get("weight_block_size")
    if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        return block[0], block[1]
    return None


def as_bf16(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, TensorInfo],
    shards: dict[str, list[TensorInfo]],
) -> tuple[dict[str, TensorInfo], dict[str, list[TensorInfo]]]:
    """The tensors and shards with block-scaled FP8 weights as the bf16 that they stand for, and without the scales."""
    block, made, scales = fp8_block(config), dict(tensors), set[str]()
    assert block is not None
    for name, info in tensors.items():
        scale = tensors.get(name + _SCALE)
        if info.dtype != torch.float8_e4m3fn or scale is None:
            continue
        wanted = tuple(-(-size // part) for size, part in zip(info.shape, block, strict=False))
        if len(info.shape) != 2 or scale.shape != wanted or scale.dtype not in (torch.float32, torch.bfloat16):
            raise BadInput(
                f"{folder}: tensor {scale.name!r} is {scale.dtype} {list(scale.shape)}, which does not scale {name!r} "
                f"{list(info.shape)} in blocks of {block[0]} × {block[1]}; the checkpoint does not fit its config.json"
            )
        bf16 = torch.bfloat16
        nbytes = math.prod(info.shape) * bf16.itemsize
        made[name] = replace(info, dtype=bf16, nbytes=nbytes, scaled=Scaled(info.dtype, scale, block))
        scales.add(scale.name)
    for name in scales:
        del made[name]
    kept = {file: [made[info.name] for info in infos if info.name in made] for file, infos in shards.items()}
    return made, {file: infos for file, infos in kept.items() if infos}
