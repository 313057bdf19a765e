from __future__ import annotations

import pytest
import torch
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from rac_kernels import FP4_NUMBERS, INT4_NUMBERS, dequantize_codes, powers_of_two


@pytest.mark.parametrize(("rows", "columns", "groups"), [(1, 2, 1), (5, 8, 2), (129, 12, 3), (0, 4, 1), (3, 0, 1)])
@pytest.mark.parametrize("numbers", [FP4_NUMBERS, INT4_NUMBERS], ids=["fp4", "int4"])
def test_numbers_times_the_scale_of_their_group(
    rows: int, columns: int, groups: int, numbers: tuple[float, ...]
) -> None:
    torch.manual_seed(0)
    which = torch.randint(16, (rows, columns))
    codes = (which[:, 0::2] | which[:, 1::2] << 4).to(torch.uint8)
    scales = torch.rand(rows, groups) + 0.1
    expected = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            expected[i, j] = numbers[which[i, j]] * scales[i, j // (columns // groups)]
    found = dequantize_codes(codes, numbers, scales, torch.full((rows, columns), torch.nan))
    assert torch.equal(found, expected)
    eighths = dequantize_codes(codes, numbers, scales, torch.empty(rows, columns), 0.125)
    assert torch.equal(eighths, expected / 8)
    turned = torch.full((columns, rows), torch.nan, dtype=torch.bfloat16)
    assert torch.equal(dequantize_codes(codes, numbers, scales, turned.T), expected.bfloat16())
    assert torch.equal(turned, expected.T.bfloat16())


def test_mxfp4_is_what_transformers_makes_of_it_bit_for_bit() -> None:
    """Every pair of codes under every exponent, what leaves bf16 at either end included."""
    assert [*FP4_NUMBERS] == FP4_VALUES
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1)
    for first in range(0, 256, 16):
        blocks = torch.arange(first, first + 16, dtype=torch.uint8).expand(1, 255, 1, 16).contiguous()
        found = torch.empty(32, 255, dtype=torch.bfloat16)
        dequantize_codes(blocks.view(255, 16), FP4_NUMBERS, powers_of_two(scales[0]), found.T)
        theirs = convert_moe_packed_tensors(blocks, scales)[0]
        assert torch.equal(found.view(torch.int16), theirs.view(torch.int16))


def test_the_exponent_255_is_no_number() -> None:
    found = torch.zeros(1, 32)
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    dequantize_codes(codes, FP4_NUMBERS, powers_of_two(torch.tensor([[255]], dtype=torch.uint8)), found)
    assert found.isnan().all()
