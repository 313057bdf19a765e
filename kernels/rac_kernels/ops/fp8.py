"""Weights with a scale for each block (FP8, int8) made the numbers that they stand for: plain torch, on any device."""

from __future__ import annotations

from torch import Tensor

_ROWS = 128  # widened at once where every row has scales of its own


def dequantize_blocks(values: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor, first: int = 0) -> Tensor:
    """out = values · the scale of each one's block of rows and columns, rounded once to out's dtype; returns out.

    values: [rows, columns] FP8 or int8, the rows from `first` on of a matrix. scales: [⌈rows / block rows⌉, ⌈columns /
    block columns⌉] of the whole matrix, of any float dtype. out: [rows, columns]. Products are made in fp32.
    """
    rows, columns = min(block[0], first + len(values)), max(min(block[1], values.shape[1]), 1)
    at = 0
    while at < len(values):
        here = (first + at) // rows
        to, beside = ((first + at) // rows * rows + rows - first, here + 1) if rows > 1 else (at + _ROWS, here + _ROWS)
        wide = scales[here:beside].float().repeat_interleave(columns, dim=1)[:, : values.shape[1]]
        to = min(to, len(values))
        out[at:to] = values[at:to].float() * wide[: to - at]
        at = to
    return out
