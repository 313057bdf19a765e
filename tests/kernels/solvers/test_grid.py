"""round_kept: on the grid, on the mask, never worse than rounding to nearest; scales, dtypes, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_kernels import Grid, factor_, fit_grid, objective, refine, round_in_order, round_kept
from rac_kernels.testing import CPU_FP32, KINDS, Poisoned, gram, running

ROWS, N, GROUP = 19, 200, 64


@pytest.fixture(params=CPU_FP32)
def backend(request):
    with running(request.param) as name:
        yield name


def problem(kind: str, density: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """H [n, n] damped, a target [rows, n], and the best weights on a mask that keeps none of row 3 nor a block of 4."""
    g = torch.Generator().manual_seed(1)
    H = gram(kind, N)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    mask = torch.rand(ROWS, N, generator=g) < density
    mask[3] = False
    mask[4, :GROUP] = False
    target = torch.randn(ROWS, N, generator=g)
    Q, _ = refine(target * mask, H, target, mask, tolerance=1e-5, iterations=50)
    return H, target, Q


@pytest.mark.parametrize("largest", [3, 7, 127])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wide range"])
def test_better_than_rounding_to_nearest(backend: str, kind: str, largest: int) -> None:
    H, T, Q = problem(kind)
    grid = fit_grid(Q, H.diagonal(), largest, GROUP)
    nearest = grid.nearest(Q)
    made, after, found = round_kept(Q, H, T, grid, backend=backend)
    least, simple, cost = (objective(T, each, H) for each in (Q, nearest, made))
    assert simple > least
    assert cost - least < 0.9 * (simple - least)
    assert found.sum(0).tolist() == pytest.approx([least, cost], rel=1e-3)
    assert torch.equal(made, after.nearest(made))
    assert (made[Q == 0] == 0).all() and not (made.signbit() & (made == 0)).any()
    assert (after.scales == after.scales.bfloat16()).all() and (after.scales[3] == 0).all() and after.scales[4, 0] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("largest", [7, 127])
def test_what_is_stored_is_scale_times_code(backend: str, largest: int, dtype: torch.dtype) -> None:
    H, T, Q = problem("correlated")
    made, grid, _ = round_kept(Q, H, T, fit_grid(Q, H.diagonal(), largest, GROUP), dtype=dtype, backend=backend)
    each = grid.scales.repeat_interleave(GROUP, 1)[:, :N]
    codes = (made / each.where(each > 0, 1)).round()
    assert codes.abs().max() <= largest
    assert torch.equal((codes * each).to(dtype), made.to(dtype)) and torch.equal(made.to(dtype).float(), made)


def test_a_dense_matrix_starts_in_order(backend: str) -> None:
    H, T, _ = problem("correlated")
    grid = fit_grid(T, H.diagonal(), 7, GROUP)
    factor = factor_(H.clone(), 0.0)
    first = round_in_order(T, factor.U, grid, backend=backend)
    torch.testing.assert_close(grid.nearest(first), first)
    made, _, _ = round_kept(first, H, T, grid, T != 0, on_grid=True, backend=backend)
    plain, in_order, both = (objective(T, each, H) for each in (grid.nearest(T), first, made))
    assert both < in_order < 0.8 * plain


def test_reads_and_writes_within_its_arguments(backend: str) -> None:
    H, T, Q = problem("plain")
    grid = fit_grid(Q, None, 7, GROUP)
    around = [Poisoned(each) for each in (Q, H, T)]
    made, _, _ = round_kept(around[0].view, around[1].view, around[2].view, grid, mask=Q != 0, backend=backend)
    wanted, _, _ = round_kept(Q, H, T, grid, backend=backend)
    assert torch.equal(made, wanted)
    assert all(each.intact() for each in around)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 64), (2, 65)])
def test_odd_shapes(backend: str, shape: tuple[int, int]) -> None:
    Q = torch.randn(shape)
    grid = fit_grid(Q, None, 7, GROUP)
    made, after, found = round_kept(Q, torch.eye(shape[1]), Q, grid, backend=backend)
    assert made.shape == Q.shape and len(found) == len(Q)
    assert after.scales.shape == (shape[0], -(-shape[1] // GROUP))
    assert (made - Q).square().sum() <= 0.02 * Q.square().sum()


def test_a_clipped_weight_lets_the_others_keep_their_digits() -> None:
    Q = torch.full((1, 64), 0.1).index_fill_(1, torch.tensor([5]), 1.0)
    weights = torch.ones(64).index_fill_(0, torch.tensor([5]), 1e-3)
    assert fit_grid(Q, weights, 7, GROUP).scales[0, 0] < fit_grid(Q, None, 7, GROUP).scales[0, 0] <= 1 / 7 + 1e-3


def test_what_does_not_fit_is_refused() -> None:
    H, T, Q = problem("plain")
    grid = fit_grid(Q, None, 7, GROUP)
    for wrong in (
        lambda: round_kept(Q, H[1:], T, grid),
        lambda: round_kept(Q, H, T[1:], grid),
        lambda: round_kept(Q.double(), H, T, grid),
        lambda: round_kept(Q, H, T, Grid(grid.scales[:, 1:], 7, GROUP)),
        lambda: round_kept(Q, H, T, grid, dtype=torch.int8),
    ):
        with pytest.raises(ValueError, match=r"must be|asks for|do not fit"):
            wrong()
