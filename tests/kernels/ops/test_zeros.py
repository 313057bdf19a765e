"""Counting zeros."""

from __future__ import annotations

import pytest
import torch

from rac_kernels import count_zeros, zeroed


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_masked_is_plus_zero_and_the_rest_as_it_was(dtype: torch.dtype) -> None:
    W = torch.tensor([[1.5, -2.0, torch.nan, -torch.inf], [-0.0, torch.nan, -3.0, 1e-3]], dtype=dtype)
    mask = torch.tensor([[False, True, True, False], [False, False, True, False]])
    made = zeroed(W, mask)
    assert made.dtype == dtype
    torch.testing.assert_close(made, W.masked_fill(mask, 0), rtol=0, atol=0, equal_nan=True)
    assert made.signbit().tolist() == W.masked_fill(mask, 0).signbit().tolist()
    assert zeroed(W.T, mask.T).shape == (4, 2)
