"""inverse_: every backend against fp64, in place, with NaN around; what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels import factor_, inverse_
from rac_kernels.testing import CPU_FP32, running


def factored(n: int) -> Tensor:
    x = torch.randn(2 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return factor_((x.T @ x).float(), 0.01).U.triu()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", CPU_FP32)
@pytest.mark.parametrize("n", [0, 1, 7, 47, 50, 97, 143, 145, 280, 577])
def test_inverse(name: str, n: int) -> None:
    U = factored(n)
    wanted = torch.linalg.inv(U.double() @ U.T.double())
    by_torch = torch.linalg.inv(U @ U.T)
    whole = torch.full((n + 2, n + 3), torch.nan)
    given = whole[1 : n + 1, 1 : n + 1]
    above = torch.ones(n, n, dtype=torch.bool).triu()
    given[above] = U[above]
    with running(name) as backend:
        inverse_(given, backend)
    found = given[above].double()
    error = (found - wanted[above]).norm()
    assert error <= 2 * (by_torch.double()[above] - wanted[above]).norm() + 1e-6 * wanted.norm()
    given[above] = torch.nan
    assert whole.isnan().all()


@pytest.mark.parametrize("name", CPU_FP32)
def test_badly_conditioned(name: str) -> None:
    """Columns of very different sizes do not cost each other accuracy."""
    n = 200
    scale = torch.logspace(-6, 6, n)
    U = factored(n)
    wanted = torch.linalg.inv(U.double() @ U.T.double())
    scaled = scale[:, None] * U
    with running(name) as backend:
        inverse_(scaled, backend)
    found = scaled.double() * scale[:, None] * scale
    torch.testing.assert_close(found.triu(), wanted.triu(), rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    "U", [torch.zeros(4, 5), torch.zeros(4), torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4).T]
)
def test_refuses(U: Tensor) -> None:
    with pytest.raises(ValueError, match="square fp32 matrix with contiguous rows"):
        inverse_(U)
