"""Bytes that pruning matrices with a common input takes: what `prune_matrices` holds around a method's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rac_engine.solve.damping import tried_rows
from rac_engine.solve.matrices import together
from rac_engine.solve.method import SOLVING, Method, Stacked
from rac_kernels.ops import factor, objective, select
from rac_kernels.solvers import grid, matching


@dataclass(frozen=True)
class GroupShape:
    """Matrices [rows in all, columns] that share their input, as they come to `prune_matrices`."""

    rows: int
    columns: int
    largest: int
    """Rows of the largest matrix, or of those of a matrix that are solved together (`run_of_rows`)."""
    by_runs: bool
    """Whether it is one matrix that is solved by runs of its rows and joined in the end."""
    weight_size: int
    """Bytes of a weight as it is stored."""
    sparsity: float
    device: torch.device
    matched: bool = False
    """Whether the dense model's outputs are matched."""
    rounded: bool = False
    """Whether kept weights are put on a grid afterwards."""
    by_outputs: bool = False
    """Whether these are known as X′ᵀY, of a single matrix, not as X′ᵀX."""
    chooses: bool = False
    """Whether the damping is chosen by tokens that are held out."""


def solving_bytes(group: GroupShape, method: Method) -> dict[str, int]:
    """Bytes by purpose of what exists while the group is pruned, beside the statistic of its input."""
    rows, n, size = group.rows, group.columns, group.weight_size
    largest = group.largest * n
    some = together(rows * n, largest)
    stacked = some * size if some > largest else 0
    moved = rows * n * size if group.device.type == "cuda" else 0
    work = method.workspace(Stacked(some, n, largest, group.sparsity, group.device))
    solving = work.pop(SOLVING)
    if group.rounded:  # the method's weights and what it was to prune are there still
        solving = max(solving, 8 * some + grid.workspace(some // n, n))
    if method.needs != "hessian":
        work[SOLVING] = moved + (rows * n - some) * size + stacked + max(solving, some * (size + 1))
        return work
    one = 4 * some
    exact = factor.workspace(n, group.device, exact=group.matched or method.exact_factor)
    goal = one if group.matched else 0  # what is pruned in the matrices' place
    shared = group.matched and not group.by_outputs
    matching_bytes = stacked + matching.workspace(some, n, shared) if group.matched else 0
    cross = 4 * largest if shared else 0
    measuring = rows * n * size + cross
    measuring += max(cross, select.workspace(largest, per="matrix"), objective.workspace(group.largest, n))
    trying = _trying(group, method) if group.chooses else 0
    # One after the other: choose a damping, factor, match, solve, round, and measure what was solved.
    solving = max(trying, exact + stacked, matching_bytes, stacked + goal + solving, goal + one + some * size)
    joining = 2 * rows * n * size if group.by_runs else 0
    work[SOLVING] = moved + max((rows * n - some) * size + solving, measuring, joining)
    return work


def _trying(group: GroupShape, method: Method) -> int:
    """Bytes of what exists while a damping is chosen for the group."""
    n, largest = group.columns, tried_rows(group.largest)
    tried = min(group.rows, -(-group.rows // group.largest) * largest)
    solving = method.workspace(Stacked(tried * n, n, largest * n, group.sparsity, group.device))[SOLVING]
    factoring = factor.workspace(n, group.device, exact=method.exact_factor)
    held = 24 if group.matched else 12  # bytes a weight: the rows, what they are to give, and a copy of each
    return held * tried * n + max(solving, factoring, objective.workspace(tried, n))
