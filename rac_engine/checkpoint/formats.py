"""The formats of quantized weights that are read, by a config.json.

To add one, write a function that makes a `Format` of a quantization_config, or None where it is another's, and put it
into `_FORMATS`. Its `find` yields the weights as they are to be presented, each with a `Quantized` that reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rac_engine.base.errors import one_line
from rac_engine.checkpoint.compressed import compressed_format
from rac_engine.checkpoint.fp4 import mxfp4_format, nvfp4_format
from rac_engine.checkpoint.packed import packed_format
from rac_engine.checkpoint.quantized import Format, sections
from rac_engine.checkpoint.scaled import fp8_format, modelopt_format

_FORMATS = (packed_format, fp8_format, modelopt_format, mxfp4_format, nvfp4_format, compressed_format)

READ = "FP8, MXFP4, NVFP4, compressed-tensors' FP8, int8 and packed int4, and what `rac pack` writes"
"""The formats in words."""

_LONGEST = 100  # name of a format that is not read


def find_format(config: Mapping[str, Any]) -> Format | None:
    """The format of a checkpoint's quantized weights; None if it has none, or of a kind that is not read."""
    said = next(iter(sections(config)), None)
    if not isinstance(said, Mapping):
        return None
    return next((form for form in (make(said) for make in _FORMATS) if form is not None), None)


def unread_format(config: Mapping[str, Any]) -> str | None:
    """What a config.json calls the format of its quantized weights, if they are of a kind that is not read."""
    said = sections(config)
    if not said or find_format(config) is not None:
        return None
    if not isinstance(said[0], Mapping):
        return one_line(str(said[0]))[:_LONGEST]
    kind = said[0].get("format") or said[0].get("quant_algo")
    return one_line(str(said[0].get("quant_method")) + ("" if kind is None else f", {kind}"))[:_LONGEST]
