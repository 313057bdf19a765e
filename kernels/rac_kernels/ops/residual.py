"""Residual connections: what a block adds to the hidden states, and what it would have to add.

Plain torch on any device is all there is.
"""

from __future__ import annotations

from torch import Tensor


def add_residual(hidden: Tensor, output: Tensor, scale: float = 1.0, factor: Tensor | None = None) -> Tensor:
    """(hidden + scale · output) · factor, both [tokens, n] of one float dtype; factor [1], 1 where there is none."""
    made = hidden + (output if scale == 1 else output * scale)
    return made if factor is None else made * factor


def residual_gap(wanted: Tensor, hidden: Tensor, scale: float = 1.0) -> Tensor:
    """The output that `add_residual` would turn `hidden` into `wanted` with, [tokens, n] in hidden's dtype.

    wanted and hidden: [tokens, n], any float dtype; the difference is made in fp32.
    """
    return (wanted.float() - hidden.float()).div_(scale).to(hidden.dtype)
