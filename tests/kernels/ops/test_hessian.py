"""hessian_accumulate_: accuracy over shapes, dtypes, strides and weights; what it leaves alone; what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_kernels import hessian_accumulate_, symmetrize_
from rac_kernels.ops.hessian import hessian_accumulate_reference
from rac_kernels.testing import CPU, Poisoned, assert_close, running, triangle_error
from tests.kernels.tokens import DTYPES, Case, cases, exact, plain


@pytest.fixture(params=CPU)
def backend(request):
    with running(request.param) as name:
        yield name


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CPU)
@settings(max_examples=60, deadline=None)
@given(case=cases(300, 120), threads=st.integers(1, 3))
@example(case=Case(1, 1, torch.bfloat16, "rows", "none"), threads=1)
@example(case=Case(0, 5, torch.float32, "rows", "general"), threads=1)
@example(case=Case(1025, 97, torch.bfloat16, "rows", "mask"), threads=2)  # more than one chunk, an odd last step
@example(case=Case(513, 289, torch.float32, "columns", "none"), threads=2)  # more than one macro tile
def test_any_tokens(name: str, case: Case, threads: int) -> None:
    X, weights, n = case.X(), case.weights(), case.n
    before = torch.randn(n, n)
    around = Poisoned(before.triu() + torch.full_like(before, torch.nan).tril(-1))
    H = around.view
    with running(name) as backend, on_threads(threads):
        assert hessian_accumulate_(H, X, weights, backend=backend) is H
    wanted = before.double() + exact(X, weights)
    assert_close(H, wanted, before + plain(X, weights), triangle_error)
    assert H.tril(-1)[torch.ones(n, n).tril(-1).bool()].isnan().all()
    assert around.intact()


def test_long_sums_stay_accurate(backend: str) -> None:
    X = Case(20_000, 50, torch.bfloat16, "rows", "none").X()
    wanted = exact(X, None)
    assert triangle_error(hessian_accumulate_(torch.zeros(50, 50), X, backend=backend), wanted) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_of_weight_zero_may_hold_anything(backend: str, dtype: torch.dtype) -> None:
    X = torch.randn(40, 30).to(dtype)
    kept = torch.arange(40) % 3 > 0
    spoilt = X.clone()
    spoilt[~kept] = torch.nan
    H = hessian_accumulate_(torch.zeros(30, 30), spoilt, kept, backend=backend)
    assert triangle_error(H, exact(X[kept], None)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_spoils_only_its_column(backend: str, dtype: torch.dtype) -> None:
    X = torch.randn(33, 100).to(dtype)
    X[32, 60] = torch.nan
    H = symmetrize_(hessian_accumulate_(torch.zeros(100, 100), X, backend=backend))
    spoilt = torch.zeros(100, 100, dtype=torch.bool)
    spoilt[60], spoilt[:, 60] = True, True
    assert torch.equal(H.isnan(), spoilt)


@pytest.mark.parametrize("name", CPU[1:])  # torch promises no such thing of the reference
def test_threads_do_not_change_a_bit(name: str) -> None:
    X = torch.randn(700, 400).bfloat16()
    results = []
    for threads in (1, 2, 5):
        with running(name) as backend, on_threads(threads):
            results.append(hessian_accumulate_(torch.zeros(400, 400), X, backend=backend))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_equal_weights_count_tokens_that_often(backend: str) -> None:
    X = torch.randn(100, 24).half()
    twice = hessian_accumulate_(torch.zeros(24, 24), X, torch.full((100,), 2.0), backend=backend)
    assert triangle_error(twice, 2 * exact(X, None)) < 1e-6


def test_in_fp64_the_reference_is_exact() -> None:
    X, w = torch.randn(50, 20), torch.rand(50)
    H = hessian_accumulate_reference(torch.zeros(20, 20, dtype=torch.float64), X, w)
    assert triangle_error(H, exact(X, w)) < 1e-15


def test_symmetrize() -> None:
    upper = torch.randn(2100, 2100)
    H = symmetrize_(upper.clone())
    assert torch.equal(H, H.T) and torch.equal(H.triu(), upper.triu())


@pytest.mark.parametrize(
    ("H", "X", "weights", "message"),
    [
        (torch.zeros(4, 5), torch.zeros(3, 4), None, "square fp32"),
        (torch.zeros(4, 4, dtype=torch.float64), torch.zeros(3, 4), None, "square fp32"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(3, 4), None, "contiguous rows"),
        (torch.zeros(4, 4), torch.zeros(3, 5), None, r"X must be \[tokens, 4\]"),
        (torch.zeros(4, 4), torch.zeros(2, 3, 4), None, r"X must be \[tokens, 4\]"),
        (torch.zeros(4, 4), torch.zeros(3, 4).double(), None, "bf16, fp16 or fp32"),
        (torch.zeros(4, 4), torch.zeros(3, 4, device="meta"), None, "X is on meta"),
        (torch.zeros(4, 4), torch.zeros(3, 4), torch.ones(4), "one a token"),
        (torch.zeros(4, 4), torch.zeros(3, 4), torch.ones(3, device="meta"), "weights are on meta"),
        (torch.zeros(4, 4), torch.zeros(3, 4), torch.tensor([1.0, -1, 1]), "at least 0"),
        (torch.zeros(4, 4), torch.zeros(3, 4), torch.tensor([1.0, torch.nan, 1]), "finite"),
    ],
)
def test_refuses(H: Tensor, X: Tensor, weights: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hessian_accumulate_(H, X, weights)
