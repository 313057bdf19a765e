from __future__ import annotations

import pytest
import torch

from rac_kernels import dequantize_blocks


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 7), (8, 8), (9, 3), (17, 20), (0, 4)])
@pytest.mark.parametrize("block", [(4, 4), (128, 128), (3, 5)])
def test_values_times_the_scale_of_their_block(rows: int, columns: int, block: tuple[int, int]) -> None:
    values = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.1
    expected = torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            expected[i, j] = values[i, j].float() * scales[i // block[0], j // block[1]]
    found = dequantize_blocks(values, scales, block, torch.full((rows, columns), torch.nan))
    assert torch.equal(found, expected)
    half = dequantize_blocks(values, scales, block, torch.empty(rows, columns, dtype=torch.bfloat16))
    assert torch.equal(half, expected.bfloat16())
    for first in (rows // 3, rows // 2):
        part = dequantize_blocks(values[first:], scales, block, torch.empty(rows - first, columns), first)
        assert torch.equal(part, found[first:])
