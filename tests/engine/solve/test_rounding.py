"""Kept weights on a grid: what pruning with other `values` gives, by every method, and what packing finds of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rac_engine.solve.costs import GroupShape, solving_bytes
from rac_engine.solve.matrices import joined, prune_matrices, prune_matrix
from rac_engine.solve.method import SOLVING, Target
from rac_engine.solve.methods import find_method, method_names
from rac_engine.solve.rounding import scale_columns
from rac_kernels import LARGEST, fit_grid, objective, pack, unpack


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    """W [40, 192] and H of correlated tokens, of which one input is always zero."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(700, 192, generator=g) @ torch.randn(192, 192, generator=g) * torch.logspace(0.5, -0.5, 192)
    x[:, 7] = 0
    return torch.randn(40, 192, generator=g).bfloat16(), x.T @ x


@pytest.mark.parametrize(("sparsity", "pattern"), [(0.7, None), (0.75, "1:4")])
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("method", method_names())
def test_packing_finds_codes_and_scales(
    problem: tuple[Tensor, Tensor], method: str, values: str, sparsity: float, pattern: str | None
) -> None:
    W, H = problem
    result = prune_matrix(W, H, method, sparsity, pattern, values=values)
    Q, rounding = result.weight, result.rounding
    assert rounding is not None and rounding.values == values
    packed = pack(Q, "int8" if values == "int8" else "int4", group=rounding.grid.group)
    assert torch.equal(unpack(packed), Q)
    assert result.zeros == int((Q == 0).sum()) and not Q.signbit()[Q == 0].any()
    assert 0 <= rounding.lost <= result.zeros - 0.98 * sparsity * Q.numel()
    if values == "int8":
        same = prune_matrix(W, H, method, sparsity, pattern)
        assert same.rounding is None
        assert (result.objective or 0) < 1.02 * (same.objective or 0)


@pytest.mark.parametrize("values", ["int4", "int3"])
@pytest.mark.parametrize("method", ["admm", "sparsegpt", "alps"])
def test_others_make_up_for_what_rounding_does(problem: tuple[Tensor, Tensor], method: str, values: str) -> None:
    W, H = problem
    same, result = (prune_matrix(W, H, method, 0.7, values=kind) for kind in ("same", values))
    group = scale_columns(Target(0.7), 192)
    nearest = fit_grid(same.weight.float(), H.diagonal(), LARGEST[values], group).nearest(same.weight)
    least, simple = same.objective, objective(W, nearest, H)
    assert least is not None and result.objective is not None and least < simple
    assert result.objective - least < 0.8 * (simple - least)
    assert result.rounding is not None and result.rounding.cost is not None
    assert result.rounding.cost > 0 or method == "sparsegpt"  # which had not found the best weights


def test_without_sparsity_all_weights_are_rounded(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    result = prune_matrix(W, H, "admm", 0.0, values="int4")
    nearest = fit_grid(W.float(), H.diagonal(), 7, 64).nearest(W)
    assert result.rounding is not None and result.rounding.grid.group == 64
    assert torch.equal(unpack(pack(result.weight, "int4", group=64)), result.weight)
    assert (result.objective or 0) < 0.6 * objective(W, nearest, H)
    assert result.notes and "always zero" in result.notes[0]


def test_each_matrix_of_a_group_and_runs_of_rows(problem: tuple[Tensor, Tensor]) -> None:
    W, H = problem
    target = Target(0.7, values="int4")
    parts = prune_matrices([W[:25], W[25:]], H.triu(), "admm", target)
    whole = joined(parts)
    groups = -(-192 // scale_columns(target, 192))
    assert whole.rounding is not None and whole.rounding.grid.scales.shape == (40, groups)
    costs = [part.rounding.cost for part in parts if part.rounding is not None and part.rounding.cost is not None]
    assert whole.rounding.cost == pytest.approx(sum(costs)) and len(costs) == 2
    each = whole.rounding.grid.nearest(whole.weight.float()).bfloat16()
    assert torch.equal(each, whole.weight)
    assert joined([parts[0], prune_matrices([W], H.triu(), "admm", Target(0.7))[0]]).rounding is None


def test_a_matrix_that_saw_nothing_is_rounded_to_nearest(problem: tuple[Tensor, Tensor]) -> None:
    W, _ = problem
    target, nothing = Target(0.7, values="int4"), torch.zeros(192, 192)
    (result,) = prune_matrices([W], nothing.clone(), "admm", target, unseen="magnitude")
    assert result.rounding is not None and result.rounding.cost is None
    (dense,) = prune_matrices([W], nothing, "admm", target)
    assert dense.rounding is None and torch.equal(dense.weight, W)


def test_a_plan_knows_what_rounding_takes() -> None:
    def planned(rounded: bool) -> int:
        shape = GroupShape(8960, 1536, 8960, False, 2, 0.5, torch.device("cpu"), rounded=rounded)
        return solving_bytes(shape, find_method("sparsegpt"))[SOLVING]

    assert planned(True) > planned(False)
