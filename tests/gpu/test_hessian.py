"""The Hessian's Triton kernels on a GPU, or in Triton's interpreter on small shapes (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch

from rac_kernels import hessian_accumulate_
from rac_kernels.testing import Poisoned, assert_close, triangle_error

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
# tokens, n, dtype, weighting, layout: small shapes in all their kinds, and on a GPU large ones.
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = [(70, 17, dtype, weighting, "rows") for dtype in DTYPES for weighting in ("none", "mask", "general")]
CASES += [(70, 150, dtype, "none", layout) for dtype in DTYPES[1:] for layout in ("columns", "odd stride")]
CASES += [(0, 20, torch.float16, "none", "rows"), (1, 1, torch.float16, "none", "rows")]
CASES += [(1, 200, torch.float32, "general", "rows")]
CASES += [(1100, 300, torch.float16, "none", "rows"), (1100, 130, torch.float32, "none", "rows")]
if GPU:
    LARGE = [(8192, 3584), (9001, 1537), (4096, 8960), (65_536, 256)]
    CASES += [
        (*shape, dtype, weighting, "rows") for shape in LARGE for dtype in DTYPES for weighting in ("none", "general")
    ]
else:
    # The interpreter multiplies the bit patterns of bf16, except where the kernel makes them fp32 first.
    CASES = [case for case in CASES if case[2] != torch.bfloat16 or case[3] != "none"]


@pytest.mark.parametrize(("tokens", "n", "dtype", "weighting", "layout"), CASES)
def test_any_tokens(tokens: int, n: int, dtype: torch.dtype, weighting: str, layout: str) -> None:
    g = torch.Generator(DEVICE).manual_seed(tokens + n)
    values = (torch.randn(tokens, n, generator=g, device=DEVICE) + 0.5).to(dtype)
    shape = (n + 2, tokens + 3) if layout == "columns" else (tokens + 2, n + 3 if layout == "odd stride" else n)
    whole = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    X = whole[1 : 1 + n, 2 : 2 + tokens].T if layout == "columns" else whole[1 : 1 + tokens, :n]
    X.copy_(values)
    weights = None
    if weighting != "none":
        weights = torch.rand(tokens, generator=g, device=DEVICE)
        weights[::3] = 0
        X[::3] = torch.nan
        weights = (weights > 0).float() if weighting == "mask" else weights
    before = torch.randn(n, n, generator=g, device=DEVICE)
    around = Poisoned(before.triu() + torch.full_like(before, torch.nan).tril(-1))
    H = around.view

    hessian_accumulate_(H, X, weights, backend="triton")

    x = values.double()
    wanted = before.double() + x.T @ (x if weights is None else x * weights.double()[:, None])
    x32 = values.float()
    plain = before + x32.T @ (x32 if weights is None else x32 * weights[:, None])
    assert_close(H, wanted, plain, triangle_error)
    below = torch.ones(n, n, device=DEVICE).tril(-1).bool()
    assert H[below].isnan().all()
    assert around.intact()


@pytest.mark.skipif(not GPU, reason="races do not show in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    X = torch.randn(9000, 3500, device=DEVICE).to(dtype)
    results = [hessian_accumulate_(torch.zeros(3500, 3500, device=DEVICE), X) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.skipif(not GPU or torch.cuda.mem_get_info()[0] < 12 << 30, reason="large")
def test_offsets_beyond_32_bits() -> None:
    n = 47_104  # n² is more than 2³¹
    H = torch.zeros(n, n, device=DEVICE)
    X = torch.randn(64, n, device=DEVICE, dtype=torch.bfloat16)
    hessian_accumulate_(H, X)
    for lo in (0, n - 200):
        wanted = X[:, lo : lo + 200].double().T @ X[:, n - 200 :].double()
        assert triangle_error(H[lo : lo + 200, n - 200 :], wanted) < 1e-6
