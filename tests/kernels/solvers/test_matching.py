"""The target that matches the dense model's outputs, and what is left of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels import factor_, matched_target, objective, reconstruction_error


@pytest.fixture
def streams() -> tuple[Tensor, Tensor, Tensor]:
    """W [24, 40], inputs X of a dense model [500, 40] and X′ of a pruned one, fp64; input 7 is always zero."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(40, 40, generator=generator, dtype=torch.float64) * torch.logspace(1, -1, 40, dtype=torch.float64)
    X = torch.randn(500, 40, generator=generator, dtype=torch.float64) @ mix
    X[:, 7] = 0
    shifted = X + 0.3 * torch.randn(500, 40, generator=generator, dtype=torch.float64) * X.std(0)
    W = torch.randn(24, 40, generator=generator, dtype=torch.float64)
    return W, X, shifted


@pytest.mark.parametrize("damping", [1e-6, 0.01])
def test_target_is_the_ridge_regression_towards_the_dense_weights(
    streams: tuple[Tensor, Tensor, Tensor], damping: float
) -> None:
    W, X, given = streams
    factor = factor_((given.T @ given).float(), damping)
    found = matched_target(factor, (given.T @ (X @ W.T)).float(), W.bfloat16())
    live = ~factor.dead
    H = (given.T @ given)[live][:, live] + factor.ridge * torch.eye(39, dtype=torch.float64)
    wanted = torch.linalg.solve(H, (given.T @ X @ W.T)[live] + factor.ridge * W.bfloat16().double().T[live]).T
    torch.testing.assert_close(found[:, live].double(), wanted, rtol=2e-3, atol=2e-3)
    assert not found[:, 7].any()


def test_without_any_drift_the_target_is_the_dense_matrix(streams: tuple[Tensor, Tensor, Tensor]) -> None:
    W, X, _ = streams
    factor = factor_((X.T @ X).float(), 0.01)
    found = matched_target(factor, (X.T @ (X @ W.T)).float(), W)
    live = ~factor.dead
    torch.testing.assert_close(found[:, live].double(), W[:, live], rtol=1e-3, atol=1e-3)


def test_error_is_that_of_the_outputs(streams: tuple[Tensor, Tensor, Tensor]) -> None:
    W, X, given = streams
    Q, Y = W * (torch.rand(W.shape) < 0.5), X @ W.T
    power = float(Y.square().sum())
    found = reconstruction_error(Q, (given.T @ given).triu(), given.T @ Y, power)
    assert found == pytest.approx(float((given @ Q.T - Y).square().sum()), rel=1e-9)
    assert found != pytest.approx(objective(W, Q, given.T @ given), rel=1e-3)
    assert reconstruction_error(W, X.T @ X, X.T @ Y, power) == pytest.approx(0, abs=1e-9 * power)


def test_what_does_not_fit_is_refused(streams: tuple[Tensor, Tensor, Tensor]) -> None:
    W, X, _ = streams
    factor = factor_((X.T @ X).float())
    with pytest.raises(ValueError, match="asks for"):
        matched_target(factor, torch.zeros(24, 40), W)
    with pytest.raises(ValueError, match="must be"):
        reconstruction_error(W, X.T @ X, torch.zeros(24, 40), 1.0)
