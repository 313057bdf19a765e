"""inverse_ by halves on a GPU, or in Triton's interpreter on small matrices (tests/triton runs that)."""

from __future__ import annotations

import os

import pytest
import torch

from rac_kernels import factor_, inverse_
from rac_kernels.ops import inverse
from rac_kernels.testing import gram

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or TRITON_INTERPRET=1"
)
SIZES = [0, 1, 50, 130, 300] + ([513, 1000, 1537, 4096] if GPU else [])


@pytest.mark.parametrize("n", SIZES)
def test_inverse(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64, and as near as the reference; below the diagonal nothing is read or written."""
    if n < 512:
        monkeypatch.setattr(inverse, "SIDE", 128)
    U = factor_(gram("correlated", n, device=DEVICE), 0.01, backend="reference").U.triu()
    wanted = torch.linalg.inv(U.double() @ U.double().T)
    above = torch.ones(n, n, dtype=torch.bool, device=DEVICE).triu()
    errors = []
    for backend in ("triton", "reference"):
        whole = torch.full((n + 2, n + 3), torch.nan, device=DEVICE)
        given = whole[1 : n + 1, 1 : n + 1]
        given[above] = U[above]
        inverse_(given, backend)
        errors.append(float((given.double() - wanted)[above].norm()))
        given[above] = torch.nan
        assert whole.isnan().all()
    assert errors[0] <= 2 * errors[1] + 1e-6 * float(wanted.norm())
    if GPU:
        given[above] = U[above]
        inverse_(given)  # what "auto" takes
        assert float((given.double() - wanted)[above].norm()) == errors[0]
