from __future__ import annotations

import pytest
import torch

from rac_kernels import all_finite, finite_tokens

BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", BAD)
def test_one_value_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    x = torch.randn(7, 9).to(dtype)
    assert all_finite(x) and all_finite(x.T) and all_finite(x[:0])
    x[3, 8] = bad
    assert not all_finite(x) and not all_finite(x[3:4, 8]) and all_finite(x[:3])


def test_eight_bits_and_integers() -> None:
    x = torch.ones(4, 4).to(torch.float8_e4m3fn)
    assert all_finite(x)
    x.view(torch.uint8)[1, 2] = 0x7F  # the NaN of E4M3
    assert not all_finite(x)
    assert all_finite(torch.arange(3)) and all_finite(torch.ones(2, dtype=torch.bool))


def test_every_token_is_kept_as_it_is_where_all_are_finite() -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    (a, b), weights, dropped = finite_tokens(None, x, y)
    assert a is x and b is y and weights is None and dropped == 0


@pytest.mark.parametrize("bad", BAD)
def test_tokens_that_are_not_finite_in_any_part_are_left_out_of_all(bad: float) -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    x[1, 2], y[4, 0] = bad, bad
    good = torch.tensor([0, 2, 3, 5])
    (a, b), weights, dropped = finite_tokens(None, x, y)
    assert torch.equal(a, x[good]) and torch.equal(b, y[good]) and weights is None and dropped == 2


def test_tokens_of_weight_0_are_left_out_and_not_counted_as_dropped() -> None:
    x = torch.randn(5, 3)
    x[0, 0] = x[3, 1] = float("nan")
    (a,), weights, dropped = finite_tokens(torch.tensor([0.0, 2.0, 0.0, 1.0, 0.5]), x)
    assert torch.equal(a, x[[1, 4]]) and dropped == 1
    assert weights is not None and weights.tolist() == [2.0, 0.5]


def test_weights_that_are_all_1_are_none() -> None:
    x = torch.randn(3, 2)
    (a,), weights, dropped = finite_tokens(torch.tensor([1.0, 0.0, 1.0]), x)
    assert torch.equal(a, x[[0, 2]]) and weights is None and dropped == 0


def test_no_token() -> None:
    (a,), weights, dropped = finite_tokens(torch.ones(0), torch.empty(0, 4))
    assert a.shape == (0, 4) and weights is None and dropped == 0
