"""Weights that lie quantized in a checkpoint, presented as the numbers that they stand for: what formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint.header import TensorInfo

_KEY = "quantization_config"

_LEFT_OUT = (
    *("input_scale", "activation_scale", "output_scale", "input_global_scale", "input_scale_ub"),
    *("q_scale", "k_scale", "v_scale", "gate_up_proj_activation_scale", "down_proj_activation_scale"),
)
"""Last parts of names: scales of quantized activations and caches, which plain weights have no use for."""


@dataclass(frozen=True)
class Format:
    """A format of quantized weights, as a config.json asks for it."""

    words: str
    """What it is called in the report."""
    find: Callable[[Mapping[str, TensorInfo]], Iterator[TensorInfo]]
    """The quantized weights among a checkpoint's tensors, as they are to be presented (`quantized` set)."""


def sections(config: Mapping[str, Any]) -> list[object]:
    """What a config.json says under quantization_config, at its top and in the language model's part of it."""
    parts = (config, config.get("text_config"))
    return [part[_KEY] for part in parts if isinstance(part, Mapping) and part.get(_KEY) is not None]


def without_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that says nothing of quantized weights."""
    plain = {key: value for key, value in config.items() if key != _KEY}
    if isinstance(inner := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in inner.items() if key != _KEY}
    return plain


def plain_dtype(scales: TensorInfo) -> torch.dtype:
    """The dtype in which weights with these scales are presented."""
    return torch.float16 if scales.dtype == torch.float16 else torch.bfloat16


def misfit(values: TensorInfo, scales: TensorInfo, why: str) -> BadInput:
    """The error of scales that are not those of the values."""
    return BadInput(
        f"{scales.file.parent}: tensor {scales.name!r} is {scales.dtype} {list(scales.shape)}, which does not scale "
        f"{values.name!r} {list(values.shape)} {why}; the checkpoint does not fit its config.json"
    )


def partner(tensors: Mapping[str, TensorInfo], of: TensorInfo, name: str) -> TensorInfo:
    """The tensor called `name`, without which `of` cannot be read; `BadInput` if it is missing."""
    if name not in tensors:
        raise BadInput(
            f"{of.file.parent}: tensor {of.name!r} has no {name!r} to be read with; fetch the checkpoint again"
        )
    return tensors[name]


def presented(
    folder: Path, form: Format, shards: Mapping[str, list[TensorInfo]]
) -> tuple[dict[str, list[TensorInfo]], int]:
    """The shards with plain weights in the place of the values of quantized ones, and without what scales them.

    Also the number of tensors that were left out beside: scales of quantized activations and caches.
    """
    tensors = {info.name: info for infos in shards.values() for info in infos}
    made, gone = dict[str, TensorInfo](), set[str]()
    for info in form.find(tensors):
        assert info.quantized is not None
        parts = [part.name for part in info.quantized.parts]
        if info.name in tensors and info.name not in parts:
            raise BadInput(f"{folder}: tensors {info.name!r} and {parts[0]!r} are the same weights; remove one of them")
        made[parts[0]] = info
        gone.update(parts)
    beside = {name for name in tensors if name.rpartition(".")[2] in _LEFT_OUT and name not in gone} if made else set()
    gone |= beside
    kept = {
        file: [made.get(info.name, info) for info in infos if info.name in made or info.name not in gone]
        for file, infos in shards.items()
    }
    return {file: infos for file, infos in kept.items() if infos}, len(beside)
