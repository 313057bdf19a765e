"""The least that an operation takes, by its mathematics: what its ``limit()`` says and a timing is held against.

`rac_kernels.measure.roofline` turns it into seconds on a machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Name of the peak that products of two numbers of a dtype are held against; fp32 ones are three products in TF32.
PRODUCT_PEAKS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32x3"}


@dataclass(frozen=True)
class Limit:
    """The arithmetic and the traffic without which the result cannot be had."""

    flops: float
    """A multiplication and an addition are two."""
    moved: float
    """Bytes that must move between memory and processor at least once."""
    peak: str
    """Which rate of arithmetic it is held against: "bf16", "fp16", "fp32", or "tf32x3" for an fp32 product that a GPU
    makes of three in TF32."""
