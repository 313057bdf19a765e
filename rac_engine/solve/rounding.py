"""Kept weights on a grid of few bits: what is done with a method's weights where a recipe asks for other `values`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_engine.solve.method import Gram, Target
from rac_kernels import LARGEST, Grid, count_zeros, fit_grid, packed_group, round_in_order, round_kept, symmetrize_


@dataclass(frozen=True)
class Rounding:
    """The rounding of a matrix."""

    values: str
    """What its kept weights are stored as: int8, int4 or int3."""
    grid: Grid
    lost: int
    """Kept weights that became zero."""
    cost: float | None = None
    """Squared error of the outputs that rounding has added, under H + λI; None where no H is known."""

    @classmethod
    def joined(cls, parts: Sequence[Rounding | None]) -> Rounding | None:
        """The rounding of a matrix from those of its runs of rows, in their order; None unless all of them have one."""
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        scales = torch.cat([part.grid.scales for part in known])
        costs = [part.cost for part in known if part.cost is not None]
        cost = sum(costs) if len(costs) == len(known) else None
        grid = Grid(scales, known[0].grid.largest, known[0].grid.group)
        return cls(known[0].values, grid, sum(part.lost for part in known), cost)


def scale_columns(target: Target, columns: int) -> int:
    """Columns of a row that share a scale, as `rac_kernels.ops.packed` has it for what the target keeps."""
    if target.pattern is None:
        return packed_group(columns, 1 - target.sparsity)
    keep, _, group = target.pattern.partition(":")
    return packed_group(columns, int(keep) / int(group))


def round_matrices(
    weights: Tensor,
    goal: Tensor,
    rows: list[int],
    target: Target,
    gram: Gram | None,
    norms: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, list[Rounding]]:
    """Stacked pruned `weights` [rows of all, columns] with what is kept on the grid that `target.values` asks for.

    With H known the codes are chosen so that the outputs of `goal` [rows of all, columns], what the method was to
    prune, are kept (`rac_kernels.round_kept`); else each weight is rounded to nearest, with scales that suit the
    `norms` [columns], Σ x², where these are known. `dtype` is what the weights will be stored in. Returns fp32 weights
    and the rounding of each matrix, of so many `rows`.
    """
    largest, group = LARGEST[target.values], scale_columns(target, weights.shape[1])
    weights = weights.float()
    if gram is None:
        grid = fit_grid(weights, norms, largest, group)
        made, found = grid.nearest(weights).to(dtype).float(), None
    else:
        made, grid, found = _under_h(weights, goal, target, gram, dtype)
    told = []
    first = 0
    for count in rows:
        some = slice(first, first + count)
        cost = None if found is None else float((found[some, 1] - found[some, 0]).sum())
        lost = count_zeros(made[some]) - count_zeros(weights[some])
        told.append(Rounding(target.values, Grid(grid.scales[some], largest, group), lost, cost))
        first += count
    return made, told


def _under_h(
    weights: Tensor, goal: Tensor, target: Target, gram: Gram, dtype: torch.dtype
) -> tuple[Tensor, Grid, Tensor]:
    """Weights, grid and objectives as `rac_kernels.round_kept` has them."""
    factor = gram.borrow(target.damping)
    goal = goal.float().masked_fill(factor.dead, 0)
    mask, whole = weights != 0, not target.prunes
    grid = fit_grid(weights, factor.damped, LARGEST[target.values], scale_columns(target, weights.shape[1]))
    if whole:
        weights = round_in_order(weights, factor.U, grid)
    H = factor.U  # used up: H + λI again, of which all but the diagonal lies below it
    symmetrize_(H.T)
    H.diagonal().copy_(factor.damped)
    return round_kept(weights, H, goal, grid, mask, dtype=dtype, on_grid=whole)
