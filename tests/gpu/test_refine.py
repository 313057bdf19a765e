"""refine with its Triton kernel on a GPU, or in Triton's interpreter on small shapes (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch

from rac_kernels import objective, refine
from rac_kernels.testing import gram

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
CASES = [("correlated", 5, 40), ("dead", 9, 33), ("outliers", 3, 1100), ("rank-deficient", 4, 30), ("plain", 1, 1)]
if GPU:
    CASES += [("correlated", 3000, 1537), ("dead", 200, 4096), ("outliers", 4100, 640)]


def rows(T: torch.Tensor, Q: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    D = T.double() - Q.double()
    return ((D @ H.double()) * D).sum(1)


@pytest.mark.parametrize("method", ["gradients", "exact"])
@pytest.mark.parametrize("triangle", ["full", "lower"])
@pytest.mark.parametrize(("kind", "count", "n"), CASES)
def test_as_good_as_the_reference(kind: str, count: int, n: int, triangle: str, method: str) -> None:
    if method == "exact" and n > 1024:
        pytest.skip("solved exactly where n is small")
    g = torch.Generator(DEVICE).manual_seed(n)
    H, T = gram(kind, n, device=DEVICE), torch.randn(count, n, generator=g, device=DEVICE)
    mask = torch.rand(count, n, generator=g, device=DEVICE) < 0.5
    mask[count // 2 : count // 2 + 1] = False
    half = H if triangle == "full" else torch.where(torch.ones_like(H).tril(-1).bool(), H, torch.nan)
    found = {}
    for backend in ("triton", "reference"):
        Q, how = refine(
            T * mask,
            half,
            T,
            mask,
            triangle=triangle,
            diagonal=H.diagonal(),
            iterations=12,
            tolerance=1e-5,
            method=method,
            backend=backend,
        )
        assert (Q[~mask] == 0).all() and how.kept >= 1
        before = rows(T, T * mask, H)
        assert (rows(T, Q, H) <= before + 1e-6 * (before + rows(T, torch.zeros_like(T), H))).all()
        found[backend] = objective(T, Q, H)
    assert found["triton"] <= found["reference"] * 1.0001 + 1e-6 * objective(T, torch.zeros_like(T), H)


def test_tf32_elsewhere_does_not_matter() -> None:
    H, T = gram("correlated", 50, device=DEVICE), torch.randn(6, 50).to(DEVICE)
    mask = torch.rand(6, 50).to(DEVICE) < 0.5
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        loose, _ = refine(T * mask, H, T, mask, backend="triton")
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    strict, _ = refine(T * mask, H, T, mask, backend="triton")
    torch.testing.assert_close(loose, strict, rtol=1e-5, atol=1e-6)
