"""ADMM for masks: exactly as many zeros as asked for, and a better mask than scores by themselves give."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rac_kernels import FactorError, admm, admm_short_, factor_, objective, refactor_, refine, sweep
from rac_kernels.admm import State, _inverse_, _scaled, _settle_native, _settle_reference, inversions


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


@pytest.mark.parametrize("pattern", [None, (2, 4), (3, 8), (1, 3)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("threads", [1, 3])
def test_settling_in_native_code_is_the_reference_to_the_bit(
    pattern: tuple[int, int] | None, sparsity: float, threads: int
) -> None:
    """Quarters, so that nothing is rounded and many tie; of thresholds enough to be looked for near a sample's."""
    generator = torch.Generator().manual_seed(0)
    shape = 37, 964 if pattern == (2, 4) else 960
    made = [torch.randint(-800, 801, shape, generator=generator) / 4 for _ in range(3)]
    kept = torch.rand(shape, generator=generator) > 0.5
    T, V, goal = made
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for settle in (_settle_native, _settle_reference):
            state = State(T.clone(), V.clone(), kept.clone(), goal, torch.empty(shape, dtype=torch.bfloat16))
            settle(state, 1.5, 0.5, sparsity, pattern, [10, 27])
            found.append((state.T, state.kept, state.gap))
    finally:
        torch.set_num_threads(before)
    for native, reference in zip(*found, strict=True):
        torch.testing.assert_close(native, reference, rtol=0, atol=0)


def test_settling_rounds_to_the_nearest_bf16() -> None:
    T = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    kept, gap = torch.ones(T.shape, dtype=torch.bool), torch.empty(T.shape, dtype=torch.bfloat16)
    _settle_native(State(T.clone(), T.clone(), kept, torch.zeros_like(T), gap), 1.0, 1.0, 0.0, None, [64])
    torch.testing.assert_close(gap, T.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 50, 96, 97, 280, 1700])
def test_inverse_is_made_above_the_diagonal_in_place(n: int) -> None:
    x = torch.randn(2 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor = factor_((x.T @ x).float(), 0.01)
    U, below = factor.U, factor.U.tril(-1)
    inverse = torch.linalg.inv((U.triu() @ U.triu().T).double())
    _inverse_(U)
    torch.testing.assert_close(U.triu().double(), inverse.triu(), rtol=0, atol=1e-5 * float(inverse.abs().max()))
    torch.testing.assert_close(U.tril(-1), below, rtol=0, atol=0)


def test_a_step_multiplies_by_the_symmetric_matrix() -> None:
    n = 230
    U = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.5
    M = torch.empty(n, n, dtype=torch.bfloat16)
    _scaled(U, scale, M)
    whole = (U.triu() + U.triu(1).T) * scale[:, None] * scale
    torch.testing.assert_close(M.float(), whole, rtol=2**-8, atol=0)
    assert torch.equal(M, M.T)
    before = M.float()
    _scaled(2 * U, scale, M, 1 / 3)
    torch.testing.assert_close(M.float(), before.lerp(2 * whole, 1 / 3), rtol=2**-8, atol=0)
    assert torch.equal(M, M.T)


def test_between_two_inverses_their_mean_does(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = problem(48, 160)
    module, inverted = sys.modules["rac_kernels.admm"], []

    def count(U: Tensor) -> None:
        inverted.append(U)
        _inverse_(U)

    monkeypatch.setattr(module, "_inverse_", count)
    costs = {}
    for every in (1, module.INVERT):
        monkeypatch.setattr(module, "INVERT", every)
        inverted.clear()
        costs[every] = objective(W, admm_short_(W, factor_(H.clone(), 0.01), 0.6, steps=40), H)
        assert len(inverted) == inversions(40)
    assert costs[module.INVERT] == pytest.approx(costs[1], rel=0.01)
    assert costs[module.INVERT] != costs[1]


def test_products_in_bf16_cost_nothing_of_the_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run with every product in fp64, on inputs of which a direction outweighs all others."""
    W, H = problem(48, 160)
    mean = torch.randn(160, generator=torch.Generator().manual_seed(3))
    H = H + 50 * H.diagonal().mean() * torch.outer(mean, mean)

    def cost() -> float:
        Q = admm_short_(W, factor_(H.clone(), 0.01), 0.6)
        return objective(W, refine(Q, H, W, iterations=200, tolerance=1e-6)[0], H)

    in_bf16 = cost()
    exact: dict[str, Tensor] = {}

    def keep(U: Tensor, scale: Tensor, M: Tensor, share: float = 1.0) -> None:
        whole = (U.triu() + U.triu(1).T).double() * scale.double()[:, None] * scale.double()
        exact["M"] = exact.get("M", whole).lerp(whole, share)

    def product(V: Tensor, gap: Tensor, M: Tensor, backend: str) -> None:
        V.add_((exact["gap"].double() @ exact["M"]).float())

    def settle(state: State, *how: Any) -> None:
        _settle_reference(state, *how)
        exact["gap"] = torch.where(state.kept, state.T, -state.T) - state.goal

    module = sys.modules["rac_kernels.admm"]
    for name, instead in {"_scaled": keep, "cross_accumulate_": product, "_settle_native": settle}.items():
        monkeypatch.setattr(module, name, instead)
    assert in_bf16 == pytest.approx(cost(), rel=0.02)


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
