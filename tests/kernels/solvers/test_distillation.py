"""The divergence of next tokens and its gradient, and steps on the weights that a mask keeps."""

from __future__ import annotations

import pytest
import torch

from rac_kernels.solvers import distillation
from rac_kernels.solvers.adam import MaskedAdam
from rac_kernels.solvers.distillation import KeptWeights, divergence_, most_probable


@pytest.mark.parametrize("count", [1, 5, 30, 64], ids=["one", "five", "all-but-none-left", "more-than-there-are"])
def test_divergence_and_gradient_are_those_of_the_parts(count: int) -> None:
    dense, own = (3 * torch.randn(7, 30, dtype=torch.float64) for _ in range(2))
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.0, 1.0, 3.0])
    wanted, ids = most_probable(dense.float(), count)
    assert torch.allclose(wanted[:, :-1], dense.log_softmax(1).gather(1, ids).float(), atol=1e-5)
    own.requires_grad_(True)
    p, q = dense.softmax(1), own.softmax(1)

    def parts(x: torch.Tensor) -> torch.Tensor:
        most = x.gather(1, ids)
        return most if count >= 30 else torch.cat([most, 1 - most.sum(1, keepdim=True)], 1)

    whole = (parts(p) * (parts(p) / parts(q)).log()).sum(1) @ weights.double()
    (gradient,) = torch.autograd.grad(whole, own)
    logits = own.detach().float()
    assert float(divergence_(logits, wanted, ids, weights)) == pytest.approx(float(whole.detach()), rel=1e-4)
    assert torch.allclose(logits.double(), gradient, atol=2e-6)


def test_probabilities_beyond_fp32_spoil_nothing() -> None:
    wanted, ids = most_probable(torch.tensor([[200.0, 0.0, 0.0, 0.0]]), 2)
    logits = torch.tensor([[-200.0, 0.0, 300.0, 0.0]])
    assert torch.isfinite(divergence_(logits, wanted, ids, torch.ones(1))) and torch.isfinite(logits).all()


def test_kept_weights_step_as_masked_adam_does() -> None:
    weight = torch.randn(6, 10) * (torch.rand(6, 10) < 0.5)
    whole, kept = weight.clone(), KeptWeights.of(weight)
    assert torch.equal(kept.weight(torch.float32), weight)
    adam = MaskedAdam([whole])
    for number in range(1, 9):
        gradient = torch.randn(6, 10)
        kept.step(gradient, number, number / 8)
        adam.step([gradient.clone()], distillation.step_size(number / 8))
    moved = (whole - weight).abs().max()
    assert moved > distillation.STEP * weight.abs().max()
    assert torch.allclose(kept.weight(torch.float32), whole, atol=0.02 * float(moved))  # means are in bf16
    assert torch.equal(kept.weight(torch.bfloat16) == 0, weight == 0)


def test_a_matrix_without_weights_stays() -> None:
    kept = KeptWeights.of(torch.zeros(3, 4))
    kept.step(torch.ones(3, 4), 1, 0.5)
    assert torch.equal(kept.weight(torch.float16), torch.zeros(3, 4, dtype=torch.float16))
