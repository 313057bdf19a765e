from __future__ import annotations

import pytest
import torch

from rac_kernels import add_residual, residual_gap


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gap_is_what_is_to_be_added(dtype: torch.dtype, scale: float) -> None:
    hidden, wanted = torch.randn(2, 9, 5).to(dtype)
    before = hidden.clone()
    gap = residual_gap(wanted, hidden, scale)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(gap.double(), (wanted.double() - hidden.double()) / scale, rtol=2 * eps, atol=1e-6)
    torch.testing.assert_close(add_residual(hidden, gap, scale), wanted, rtol=4 * eps, atol=8 * eps)
    assert gap.dtype == dtype and torch.equal(hidden, before)


def test_without_a_scale_the_sum_is_rounded_once() -> None:
    hidden, output = torch.randn(2, 7, 3).bfloat16()
    assert torch.equal(add_residual(hidden, output), (hidden.float() + output.float()).bfloat16())
