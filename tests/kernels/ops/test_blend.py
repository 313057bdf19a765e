from __future__ import annotations

import pytest
import torch

from rac_kernels import blend_


def test_the_other_is_added_by_its_weight_and_stays() -> None:
    H, other = torch.randn(5, 5), torch.randn(5, 5)
    expected, before = H.double() + 0.3 * other.double(), other.clone()
    assert blend_(H, other, 0.3) is H
    torch.testing.assert_close(H.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(other, before)


def test_what_does_not_fit_is_refused() -> None:
    for other in (torch.zeros(5), torch.zeros(1, 5), torch.zeros(5, 5, dtype=torch.float64)):
        with pytest.raises(ValueError, match="cannot be blended"):
            blend_(torch.zeros(5, 5), other, 1.0)
