"""column_norm_accumulate_: accuracy over shapes, dtypes, strides and weights; every fp16 number; what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from rac_kernels import column_norm_accumulate_
from rac_kernels.testing import CPU, running
from tests.kernels.tokens import DTYPES, Case, cases, exact


@pytest.mark.parametrize("name", CPU)
@settings(max_examples=60, deadline=None)
@given(case=cases(60, 700))
@example(case=Case(0, 3, torch.bfloat16, "rows", "none"))
@example(case=Case(3000, 2, torch.bfloat16, "rows", "general"))
def test_any_tokens(name: str, case: Case) -> None:
    X, weights, n = case.X(), case.weights(), case.n
    whole = torch.full((n + 4,), torch.nan)
    s = whole[2 : 2 + n]
    s.copy_(torch.rand(n))
    wanted = s.double() + exact(X, weights).diagonal()
    with running(name) as backend:
        assert column_norm_accumulate_(s, X, weights, backend=backend) is s
    assert torch.allclose(s.double(), wanted, rtol=2e-7, atol=0)
    assert whole[:2].isnan().all() and whole[2 + n :].isnan().all()


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number_there_is(name: str, dtype: torch.dtype) -> None:
    X = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)[None]
    with running(name) as backend:
        s = column_norm_accumulate_(torch.zeros(1 << 16), X, backend=backend)
    assert torch.equal(s.nan_to_num(-1), X[0].double().square().float().nan_to_num(-1))


@pytest.mark.parametrize("name", CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_weight_zero_may_hold_anything(name: str, dtype: torch.dtype) -> None:
    X = torch.ones(4, 300, dtype=dtype)
    X[1], X[2] = torch.nan, torch.inf
    with running(name) as backend:
        s = column_norm_accumulate_(torch.zeros(300), X, torch.tensor([1.0, 0, 0, 0.5]), backend=backend)
    assert torch.equal(s, torch.full((300,), 1.5))


@pytest.mark.parametrize(
    ("s", "X", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(3, 4), "contiguous fp32 vector"),
        (torch.zeros(4).double(), torch.zeros(3, 4), "contiguous fp32 vector"),
        (torch.zeros(8)[::2], torch.zeros(3, 4), "contiguous fp32 vector"),
        (torch.zeros(4), torch.zeros(3, 5), r"X must be \[tokens, 4\]"),
        (torch.zeros(4), torch.zeros(3, 4).int(), "bf16, fp16 or fp32"),
    ],
)
def test_refuses(s: Tensor, X: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        column_norm_accumulate_(s, X)
