"""Counting zeros."""

from __future__ import annotations

import pytest
import torch

from rac_kernels import count_zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (5, 7), (64, 33)], ids=str)
def test_counts_both_zeros_and_nothing_else(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    W = torch.ones(shape, dtype=dtype)
    zeros = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    W[zeros] = 0.0
    W[:1, :1] = -0.0
    zeros[:1, :1] = True
    assert count_zeros(W) == int(zeros.sum())
    assert count_zeros(W.T) == count_zeros(W[:, torch.arange(shape[1] - 1, -1, -1)]) == int(zeros.sum())


def test_small_numbers_infinities_and_nan_are_no_zeros() -> None:
    assert count_zeros(torch.tensor([1e-45, torch.inf, -torch.inf, torch.nan, 0.0])) == 1
