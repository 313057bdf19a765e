"""Score profiles: sums, counts and the histogram against the scores themselves."""

from __future__ import annotations

import pytest
import torch

from rac_kernels import score_profile
from rac_kernels.ops import profile
from rac_kernels.ops.profile import BINS_AN_OCTAVE, LOWEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_and_counts_are_those_of_the_scores(dtype, monkeypatch):
    monkeypatch.setattr(profile, "ROWS_BYTES", 8 * 64 * 3)  # three rows at a time
    torch.manual_seed(0)
    W, norms = torch.randn(23, 64).to(dtype), torch.rand(64) * torch.logspace(-9, 9, 64)
    W[3, 4], norms[7] = 0, 0
    scores = W.double() ** 2 * norms.double()
    found = score_profile(W, norms)
    assert (found.count, found.zeros) == (scores.numel(), int((scores == 0).sum()))
    assert found.total == pytest.approx(float(scores.sum()), rel=1e-12)
    for octave in (-20, -3, 0, 5, 20):
        below = found.zeros + int(found.histogram[: (octave - LOWEST) * BINS_AN_OCTAVE].sum())
        assert below == int((scores < 2.0**octave).sum())


def test_profiles_add_up():
    torch.manual_seed(0)
    W, norms = torch.randn(10, 16), torch.rand(16)
    whole, parts = score_profile(W, norms), score_profile(W[:4], norms) + score_profile(W[4:], norms)
    assert torch.equal(whole.histogram, parts.histogram)
    assert (whole.count, whole.zeros) == (parts.count, parts.zeros)
    assert whole.total == pytest.approx(parts.total)


def test_scores_beyond_the_bins_are_counted_and_shapes_are_checked():
    found = score_profile(torch.tensor([[1e-38, 1e38, 0.0]]), torch.tensor([1e-38, 1e38, 1.0]))
    assert (int(found.histogram[0]), int(found.histogram[-1]), found.zeros) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"norms must be \[3\]"):
        score_profile(torch.zeros(2, 3), torch.zeros(2))
