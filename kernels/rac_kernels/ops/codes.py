"""Four-bit weights, two in a byte, made the numbers that they stand for: plain torch, on any device, and no more."""

from __future__ import annotations

import torch
from torch import Tensor

FP4_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""What the codes of FP4 (E2M1: a sign, two bits of exponent, one of mantissa) stand for."""

INT4_NUMBERS = tuple(float(number) for number in range(-8, 8))
"""What the codes of four-bit integers stand for that are stored with 8 added."""

_ROWS = 128  # widened at once


def dequantize_codes(
    codes: Tensor, numbers: tuple[float, ...], scales: Tensor, out: Tensor, factor: float = 1.0
) -> Tensor:
    """out = the number of each code · the scale of its group, rounded to out's dtype; returns out.

    codes: [rows, columns / 2] uint8, two a byte, that of the even column in the lower half. numbers: those of the codes
    0 to 15. scales: [rows, groups] of any float dtype, for groups of columns / groups consecutive columns each; all are
    multiplied by `factor` first. out: [rows, columns], of any strides. Products are made in fp32.

    Source: OCP Microscaling Formats (MX) Specification 1.0, for FP4 (E2M1) in groups and their scales (E8M0).
    """
    table = torch.tensor(numbers, dtype=torch.float32, device=codes.device)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1).view(torch.int64).flatten()
    columns = 2 * codes.shape[1]
    for at in range(0, len(codes) if columns else 0, _ROWS):
        some = codes[at : at + _ROWS]
        wide = pairs.index_select(0, some.flatten().int()).view(torch.float32)
        own = scales[at : at + _ROWS, :, None].float() * factor
        grouped = wide.view(len(some), scales.shape[1], -1) * own
        out[at : at + _ROWS] = grouped.view(len(some), columns)
    return out


def powers_of_two(exponents: Tensor) -> Tensor:
    """2^(exponent - 127) in fp32 of E8M0 scales, uint8 of any shape; 255 stands for NaN."""
    table = torch.tensor([2.0 ** (exponent - 127) for exponent in range(255)] + [torch.nan], device=exponents.device)
    return table[exponents.int()]
