from __future__ import annotations

import pytest
import torch

from rac_kernels import squared_gaps, squared_norm_accumulate_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n"), [(1, 1), (33, 7), (0, 5), (5, 0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_norms_are_added(dtype: torch.dtype, tokens: int, n: int, weighted: bool) -> None:
    x, sums = torch.randn(n, tokens).to(dtype).T, torch.full((2,), 3.0, dtype=torch.float64)
    weights = torch.rand(tokens) if weighted else None
    squares = x.double().square().sum(1)
    expected = 3 + float((squares if weights is None else squares * weights.double()).sum())
    returned = squared_norm_accumulate_(sums[1], x, weights)
    assert sums.tolist() == [3.0, pytest.approx(expected, rel=1e-6)] and returned.item() == sums[1]


def test_squared_gaps_are_those_of_fp64() -> None:
    torch.manual_seed(0)
    found, wanted = torch.randn(2, 5, 33).to(torch.bfloat16)
    gaps, wholes = squared_gaps(found, wanted)
    torch.testing.assert_close(gaps, (found.double() - wanted.double()).square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(wholes, wanted.double().square().sum(1), rtol=1e-6, atol=0)
    assert [len(part) for part in squared_gaps(found[:0], wanted[:0])] == [0, 0]
