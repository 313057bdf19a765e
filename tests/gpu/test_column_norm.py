"""The column norms' Triton kernel on a GPU, or in Triton's interpreter on small shapes (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch

from rac_kernels import column_norm_accumulate_

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
SHAPES = [(0, 5), (1, 1), (33, 129), (1030, 70)] + ([(8192, 18_944), (100_000, 300)] if GPU else [])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize(("tokens", "n"), SHAPES)
def test_any_tokens(tokens: int, n: int, step: int, dtype: torch.dtype, weighted: bool) -> None:
    g = torch.Generator(DEVICE).manual_seed(tokens + n)
    values = (torch.randn(tokens, n, generator=g, device=DEVICE) + 0.5).to(dtype)
    whole = torch.full((tokens + 2, step * n + 3), torch.nan, dtype=dtype, device=DEVICE)
    X = whole[1 : 1 + tokens, 2 : 2 + step * n : step]
    X.copy_(values)
    weights = torch.rand(tokens, generator=g, device=DEVICE) if weighted else None
    if weights is not None:
        weights[::3] = 0
        X[::3] = torch.nan
    before = torch.rand(n + 2, generator=g, device=DEVICE)
    s = before.clone()
    column_norm_accumulate_(s[1:-1], X, weights, backend="triton")
    squares = values.double().square()
    wanted = before[1:-1].double() + (squares if weights is None else squares * weights.double()[:, None]).sum(0)
    assert torch.allclose(s[1:-1].double(), wanted, rtol=1e-6, atol=0)
    assert s[0] == before[0] and s[-1] == before[-1]
