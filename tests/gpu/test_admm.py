"""The short ADMM on a GPU, its products and factors by Triton. The interpreter multiplies the bit patterns of bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels import admm_, factor_, objective
from rac_kernels.testing import gram

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU; tests/kernels/solvers/test_admm.py has what the CPU can show"
)
CASES = [
    ("plain", 1, 1, "0.5"),
    ("correlated", 9, 40, "0.7"),
    ("dead", 5, 36, "2:4"),
    ("correlated", 1000, 1537, "0.6"),
    ("dead", 300, 4096, "0.5"),
    ("outliers", 1000, 1536, "2:4"),
]


@pytest.mark.parametrize(("kind", "rows", "n", "how"), CASES)
def test_as_good_as_the_reference(kind: str, rows: int, n: int, how: str) -> None:
    sparsity, pattern = (0.5, how) if ":" in how else (float(how), None)
    H = gram(kind, n, device="cuda")
    W = torch.randn(rows, n, generator=torch.Generator("cuda").manual_seed(rows + n), device="cuda")

    def found(backend: str) -> Tensor:
        factor = factor_(H.clone(), backend=backend)
        return admm_(W.masked_fill(factor.dead, 0), factor, sparsity, pattern, backend=backend)

    Q, wanted = found("triton"), found("reference")
    assert (Q == 0).sum() == (wanted == 0).sum() and Q.isfinite().all()
    assert not (Q.signbit() & (Q == 0)).any()
    assert objective(W, Q, H) <= 1.02 * objective(W, wanted, H) + 1e-9
