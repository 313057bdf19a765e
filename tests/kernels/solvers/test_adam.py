"""Adam with the mask kept."""

from __future__ import annotations

import pytest
import torch

from rac_kernels import MaskedAdam
from rac_kernels.solvers.adam import BETAS


def test_steps_are_those_of_torch_on_the_kept_weights() -> None:
    draw = torch.Generator().manual_seed(0)
    weights = [torch.randn(7, 5, generator=draw), torch.randn(3, 11, generator=draw) * 100]
    masks = [torch.rand(weight.shape, generator=draw) < 0.4 for weight in weights]
    ours = [weight.where(mask, 0) for weight, mask in zip(weights, masks, strict=True)]
    theirs = [weight[mask].clone().requires_grad_(True) for weight, mask in zip(weights, masks, strict=True)]
    sizes = [float(kept.detach().square().mean().sqrt()) for kept in theirs]
    adam = MaskedAdam(ours)
    others = [
        torch.optim.Adam([kept], lr=0.03 * size, betas=BETAS, eps=1e-12)
        for kept, size in zip(theirs, sizes, strict=True)
    ]
    for _ in range(20):
        gradients = [torch.randn(weight.shape, generator=draw) for weight in weights]
        for kept, mask, other, gradient in zip(theirs, masks, others, gradients, strict=True):
            kept.grad = gradient[mask].clone()
            other.step()
        adam.step([gradient.clone() for gradient in gradients], 0.03)
    for weight, mask, kept in zip(ours, masks, theirs, strict=True):
        torch.testing.assert_close(weight[mask], kept.detach(), rtol=1e-5, atol=1e-6)
        assert bool((weight[~mask] == 0).all()) and not bool(weight[~mask].signbit().any())


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 4)])
def test_weights_that_are_all_zero_or_none_stay(shape: tuple[int, int]) -> None:
    weight = torch.zeros(shape)
    MaskedAdam([weight]).step([torch.ones(shape)], 0.1)
    assert torch.equal(weight, torch.zeros(shape)) and not bool(weight.signbit().any())
