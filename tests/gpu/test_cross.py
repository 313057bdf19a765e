"""The cross product's Triton kernels on a GPU, or in Triton's interpreter on small shapes (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch

from rac_kernels import cross_accumulate_
from rac_kernels.testing import Poisoned, assert_close

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
# tokens, n, m, dtype, weighting, layout: small shapes in all their kinds, and on a GPU large ones.
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = [(70, 17, 90, dtype, weighting, "rows") for dtype in DTYPES for weighting in ("none", "mask", "general")]
CASES += [(70, 150, 20, dtype, "none", layout) for dtype in DTYPES[1:] for layout in ("columns", "odd stride")]
CASES += [(0, 20, 3, torch.float16, "none", "rows"), (1, 1, 1, torch.float16, "none", "rows")]
CASES += [(1100, 300, 40, torch.float16, "none", "rows"), (1100, 130, 200, torch.float32, "general", "rows")]
if GPU:
    LARGE = [(8192, 3584, 3584), (9001, 1537, 8960), (4096, 8960, 1536), (65_536, 256, 100)]
    CASES += [
        (*shape, dtype, weighting, "rows") for shape in LARGE for dtype in DTYPES for weighting in ("none", "general")
    ]
else:
    # The interpreter multiplies the bit patterns of bf16, except where the kernel makes them fp32 first.
    CASES = [case for case in CASES if case[3] != torch.bfloat16 or case[4] != "none"]


def stream(tokens: int, n: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """Tokens [tokens, n] inside a buffer full of NaN."""
    g = torch.Generator(DEVICE).manual_seed(tokens + n)
    shape = (n + 2, tokens + 3) if layout == "columns" else (tokens + 2, n + 3 if layout == "odd stride" else n)
    whole = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
    X = whole[1 : 1 + n, 2 : 2 + tokens].T if layout == "columns" else whole[1 : 1 + tokens, :n]
    return X.copy_((torch.randn(tokens, n, generator=g, device=DEVICE) + 0.5).to(dtype))


@pytest.mark.parametrize(("tokens", "n", "m", "dtype", "weighting", "layout"), CASES)
def test_any_tokens(tokens: int, n: int, m: int, dtype: torch.dtype, weighting: str, layout: str) -> None:
    X, Y = stream(tokens, n, dtype, layout), stream(tokens, m, dtype, "rows")
    x, y = X.clone(), Y.clone()
    g = torch.Generator(DEVICE).manual_seed(tokens)
    weights = None
    if weighting != "none":
        weights = torch.rand(tokens, generator=g, device=DEVICE)
        weights[::3] = 0
        X[::3], Y[::3] = torch.nan, torch.inf
        weights = (weights > 0).float() if weighting == "mask" else weights
        y = (y.double() * weights.double()[:, None]).to(torch.float64)
    before = torch.randn(n, m, generator=g, device=DEVICE)
    around = Poisoned(before)
    C = around.view

    cross_accumulate_(C, X, Y, weights, backend="triton")

    wanted = before.double() + x.double().T @ y.double()
    plain = before + x.float().T @ y.float()
    assert_close(C, wanted, plain)
    assert around.intact()


@pytest.mark.skipif(not GPU, reason="races do not show in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat_bit_for_bit(dtype: torch.dtype) -> None:
    X, Y = torch.randn(9000, 1500, device=DEVICE).to(dtype), torch.randn(9000, 900, device=DEVICE).to(dtype)
    results = [cross_accumulate_(torch.zeros(1500, 900, device=DEVICE), X, Y) for _ in range(3)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
