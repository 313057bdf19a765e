"""cross_accumulate_: accuracy over shapes, dtypes, strides and weights; what it leaves alone; what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_kernels import cross_accumulate_, hessian_accumulate_
from rac_kernels.ops.cross import cross_accumulate_reference
from rac_kernels.testing import CPU, Poisoned, assert_close, relative_error, running
from tests.kernels.tokens import DTYPES, Case, cases


@pytest.fixture(params=CPU)
def backend(request):
    with running(request.param) as name:
        yield name


def exact(X: Tensor, Y: Tensor, weights: Tensor | None) -> Tensor:
    """Xᵀ diag(weights) Y in fp64."""
    y = Y.double()
    return X.double().T @ (y if weights is None else y * weights.double()[:, None])


@pytest.mark.parametrize("name", CPU)
@settings(max_examples=50, deadline=None)
@given(case=cases(300, 120), m=st.integers(1, 110), other=st.sampled_from(["rows", "columns", "steps"]))
@example(case=Case(1, 1, torch.bfloat16, "rows", "none"), m=1, other="rows")
@example(case=Case(0, 5, torch.float32, "rows", "general"), m=3, other="rows")
@example(case=Case(1025, 97, torch.bfloat16, "rows", "mask"), m=7, other="columns")  # chunks, an odd last step
@example(case=Case(300, 300, torch.float32, "columns", "none"), m=310, other="rows")  # more than one macro tile
def test_any_tokens(name: str, case: Case, m: int, other: str) -> None:
    X, weights, n = case.X(), case.weights(), case.n
    Y = Case(case.tokens, m, case.dtype, other, case.weighting).X()
    before = torch.randn(n, m)
    around = Poisoned(before)
    C = around.view
    with running(name) as backend:
        assert cross_accumulate_(C, X, Y, weights, backend=backend) is C
    wanted = before.double() + exact(X, Y, weights)
    y = Y.float()
    plain = before + X.float().T @ (y if weights is None else y * weights[:, None])
    assert_close(C, wanted, plain)
    assert around.intact()


def test_a_stream_with_itself_is_the_hessian(backend: str) -> None:
    X = torch.randn(200, 70).bfloat16()
    C = cross_accumulate_(torch.zeros(70, 70), X, X, backend=backend)
    H = hessian_accumulate_(torch.zeros(70, 70), X, backend=backend)
    assert relative_error(C.triu(), H.double()) < 1e-6


def test_long_sums_stay_accurate(backend: str) -> None:
    X = Case(20_000, 50, torch.bfloat16, "rows", "none").X()
    Y = X.flip(1)[:, :33]
    assert relative_error(cross_accumulate_(torch.zeros(50, 33), X, Y, backend=backend), exact(X, Y, None)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_weight_zero_may_hold_anything(backend: str, dtype: torch.dtype) -> None:
    X, Y = torch.randn(40, 30).to(dtype), torch.randn(40, 50).to(dtype)
    kept = torch.arange(40) % 3 > 0
    wanted = exact(X[kept], Y[kept], None)
    X[~kept], Y[~kept] = torch.nan, torch.inf
    assert relative_error(cross_accumulate_(torch.zeros(30, 50), X, Y, kept, backend=backend), wanted) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_spoils_only_its_row_and_column(backend: str, dtype: torch.dtype) -> None:
    X, Y = torch.randn(33, 60).to(dtype), torch.randn(33, 100).to(dtype)
    X[32, 40], Y[5, 90] = torch.nan, torch.nan
    spoilt = torch.zeros(60, 100, dtype=torch.bool)
    spoilt[40], spoilt[:, 90] = True, True
    assert torch.equal(cross_accumulate_(torch.zeros(60, 100), X, Y, backend=backend).isnan(), spoilt)


@pytest.mark.parametrize("name", CPU[1:])  # torch promises no such thing of the reference
def test_threads_do_not_change_a_bit(name: str) -> None:
    X, Y = torch.randn(300, 200).bfloat16(), torch.randn(300, 310).bfloat16()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        with running(name) as backend:
            results.append(cross_accumulate_(torch.zeros(200, 310), X, Y, backend=backend))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_in_fp64_the_reference_is_exact() -> None:
    X, Y, w = torch.randn(50, 20), torch.randn(50, 11), torch.rand(50)
    C = cross_accumulate_reference(torch.zeros(20, 11, dtype=torch.float64), X, Y, w)
    assert relative_error(C, exact(X, Y, w)) < 1e-15


@pytest.mark.parametrize(
    ("C", "X", "Y", "weights", "message"),
    [
        (torch.zeros(4, 5).double(), torch.zeros(3, 4), torch.zeros(3, 5), None, "C must be an fp32 matrix"),
        (torch.zeros(4), torch.zeros(3, 4), torch.zeros(3, 5), None, "C must be an fp32 matrix"),
        (torch.zeros(5, 4).T, torch.zeros(3, 4), torch.zeros(3, 5), None, "contiguous rows"),
        (torch.zeros(4, 5), torch.zeros(3, 5), torch.zeros(3, 5), None, r"X must be \[tokens, 4\]"),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(2, 5), None, "to fit X and C"),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 4), None, "to fit X and C"),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 5).half(), None, "to fit X and C"),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 5), torch.ones(4), "one a token"),
        (torch.zeros(4, 5), torch.zeros(3, 4), torch.zeros(3, 5), torch.tensor([1.0, -1, 1]), "at least 0"),
    ],
)
def test_refuses(C: Tensor, X: Tensor, Y: Tensor, weights: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cross_accumulate_(C, X, Y, weights)
