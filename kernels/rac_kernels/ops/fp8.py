"""Block-scaled FP8 (DeepSeek's format) made the numbers that it stands for: plain torch, on any device, and no more."""

from __future__ import annotations

from torch import Tensor


def dequantize_blocks(values: Tensor, scales: Tensor, block: tuple[int, int], out: Tensor, first: int = 0) -> Tensor:
    """out = values · the scale of each one's block of rows and columns, rounded once to out's dtype; returns out.

    values: [rows, columns] FP8, the rows from `first` on of a matrix. scales: [⌈rows / block rows⌉, ⌈columns / block
    columns⌉] of the whole matrix, fp32 or bf16. out: [rows, columns]. Products are made in fp32.
    """
    rows, columns = min(block[0], first + len(values)), max(min(block[1], values.shape[1]), 1)
    wide = scales.float().repeat_interleave(columns, dim=1)[:, : values.shape[1]]
    at = 0
    while at < len(values):
        to = min((first + at) // rows * rows + rows - first, len(values))
        out[at:to] = values[at:to].float() * wide[(first + at) // rows]
        at = to
    return out
