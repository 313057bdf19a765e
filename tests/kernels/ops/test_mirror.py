"""symmetrize_: every backend, strides, what lies around; what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels import symmetrize_
from rac_kernels.ops.mirror import mirror
from rac_kernels.testing import CPU_FP32, Poisoned, running


@pytest.mark.parametrize("name", CPU_FP32)
@pytest.mark.parametrize("n", [0, 1, 5, 129, 1100])
@pytest.mark.parametrize("down", [True, False], ids=["down", "up"])
def test_mirror(name: str, n: int, down: bool) -> None:
    around = Poisoned(torch.randn(2, n, n))
    H = around.view
    kept = H.triu() if down else H.tril()
    with running(name) as backend:
        assert mirror(backend)(H, down).tolist() == [True, True]
    assert torch.equal(H, H.mT) and torch.equal(H.triu() if down else H.tril(), kept)
    assert around.intact()


@pytest.mark.parametrize("name", CPU_FP32)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_says_what_is_not_finite(name: str, value: float) -> None:
    with running(name) as backend:
        for i, j in ((0, 0), (3, 140), (139, 140)):
            H = torch.ones(2, 150, 150)
            H[1, i, j] = value
            assert mirror(backend)(H.mT.contiguous(), True).tolist() == [True, i != j]
            assert mirror(backend)(H, True).tolist() == [True, False]


def test_any_dtype_and_stride() -> None:
    H = torch.randn(40, 80, dtype=torch.float64)[:, ::2]
    upper = H.triu()
    assert symmetrize_(H) is H and torch.equal(H, upper + upper.triu(1).T)


@pytest.mark.parametrize("name", CPU_FP32)
def test_contiguous_columns(name: str) -> None:
    """The lower triangle of what it is the transpose of is copied up."""
    with running(name) as backend:
        whole = torch.randn(150, 160)
        H, beyond = whole[:, :150].T, whole[:, 150:].clone()
        upper = H.triu()
        symmetrize_(H, backend)
    assert torch.equal(H, upper + upper.triu(1).T) and torch.equal(whole[:, 150:], beyond)


@pytest.mark.parametrize(
    ("H", "backend", "message"),
    [
        (torch.zeros(4, 5), "auto", "square"),
        (torch.zeros(4), "auto", "square"),
        (torch.zeros(4, 4).half(), "native", "needs an fp32 H"),
        (torch.zeros(4, 8)[:, ::2], "triton", "needs an fp32 H"),
    ],
)
def test_refuses(H: Tensor, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        symmetrize_(H, backend)
