"""ADMM for masks: exactly as many zeros as asked for, and a better mask than scores by themselves give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels import FactorError, admm, admm_short_, factor_, objective, refactor_, refine, sweep


def problem(rows: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """W [rows, n] and a damped H of correlated tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * n, n, generator=generator) @ torch.randn(n, n, generator=generator)
    x *= torch.logspace(0.5, -0.5, n)
    H = x.T @ x
    return torch.randn(rows, n, generator=generator), H + 0.01 * H.diagonal().mean() * torch.eye(n)


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.0, None), (0.5, None), (0.8, None), (1.0, None), (0.5, "2:4")])
def test_zeros_are_as_asked_for(sparsity: float, pattern: str | None) -> None:
    W, H = problem(12, 32)
    parts = [W[:5], W[5:].bfloat16()]
    for part, (Q, steps) in zip(parts, admm(parts, H, sparsity, pattern), strict=True):
        assert Q.shape == part.shape
        assert 1 <= steps <= 300
        assert not Q.signbit()[Q == 0].any()
        assert int((Q == 0).sum()) == int(sparsity * Q.numel())
        if pattern:
            assert ((Q != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.7, None), (0.5, "2:4")])
def test_mask_is_better_than_the_sweeps(sparsity: float, pattern: str | None) -> None:
    W, H = problem(24, 64)
    ((found, _),) = admm([W], H, sparsity, pattern)
    swept = sweep(W, factor_(H.clone(), 0.0).U, sparsity, pattern)
    best = [objective(W, refine(Q, H, W, iterations=200, tolerance=1e-6)[0], H) for Q in (found, swept)]
    assert best[0] < 0.95 * best[1]


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.7, None), (0.5, "2:4"), (0.0, None), (1.0, None)])
def test_short_run_is_as_good_within_a_few_per_cent(sparsity: float, pattern: str | None) -> None:
    W, H = problem(24, 64)
    ((long, _),) = admm([W], H, sparsity, pattern)
    short = admm_short_(W, factor_(H.clone(), 0.0), sparsity, pattern)
    assert int((short == 0).sum()) == int(sparsity * W.numel())
    assert not short.signbit()[short == 0].any()
    found = [objective(W, refine(Q, H, W, Q != 0, iterations=200, tolerance=1e-6)[0], H) for Q in (short, long)]
    assert found[0] <= 1.05 * found[1] + 1e-6 * float((W @ H * W).sum())


def test_stacked_matrices_have_zeros_of_their_own() -> None:
    W, H = problem(20, 32)
    W[:8] *= 10
    together = admm_short_(W, factor_(H.clone(), 0.0), 0.6, row_groups=[8, 12])
    for part, whole in zip(together.split([8, 12]), W.split([8, 12]), strict=True):
        assert int((part == 0).sum()) == int(0.6 * part.numel())
        torch.testing.assert_close(part, admm_short_(whole, factor_(H.clone(), 0.0), 0.6), rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    W, H = problem(4, 8)
    with pytest.raises(ValueError, match="fit weights"):
        list(admm([W[:, :4]], H))
    with pytest.raises(ValueError, match="fit W"):
        admm_short_(W[:, :4], factor_(H.clone(), 0.0))
    with pytest.raises(ValueError, match="whole groups"):
        list(admm([W[:, :6]], H[:6, :6], pattern="2:4"))


def test_the_factor_given_back_holds_h() -> None:
    """U is overwritten, what lies below it is not, and dead inputs stay dead."""
    W, H = problem(6, 40)
    H[7], H[:, 7] = 0, 0
    factor = factor_(H.clone(), 0.01)
    before = factor.U.tril(-1)
    Q = admm_short_(W.masked_fill(factor.dead, 0), factor, 0.5)
    torch.testing.assert_close(factor.U.tril(-1), before, rtol=0, atol=0)
    assert (Q[:, 7] == 0).all()
    kept = [column for column in range(40) if column != 7]
    damped = H + factor.ridge * torch.eye(40)
    whole = damped[kept][:, kept].contiguous()
    alone = admm_short_(W[:, kept], factor_(whole.clone(), 0.0), (0.5 * 40 - 1) / 39)
    cost = [objective(W[:, kept], refine(q, whole, W[:, kept])[0], whole) for q in (Q[:, kept], alone)]
    assert cost[0] == pytest.approx(cost[1], rel=0.1)


def test_refactor_is_the_factor_of_the_sum() -> None:
    _, H = problem(1, 50)
    factor = factor_(H.clone(), 0.01)
    added = torch.linspace(0.5, 2, 50) * H.diagonal()
    refactor_(factor, added)
    U = factor.U.triu()
    torch.testing.assert_close(U @ U.T, H + torch.diag(factor.ridge + added), rtol=1e-4, atol=1e-3)
    with pytest.raises(FactorError, match="not positive definite"):
        refactor_(factor, -2 * H.diagonal())
    with pytest.raises(ValueError, match="added must be"):
        refactor_(factor, added[:4])
