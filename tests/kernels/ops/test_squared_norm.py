from __future__ import annotations

import pytest
import torch

from rac_kernels import squared_norm_accumulate_


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
