"""The engine's own: a short ADMM finds the mask, then the weights become the best there are on it.

Where ALPS decomposes H and goes on until the mask stands still, this one factors H + λI and a penalty anew for each of
a few penalties, in the memory that H has, and takes a fixed number of steps, more slowly at each penalty
(benchmarks/solvers.py holds both). The cost of H + λI is what is minimised throughout, so with outputs matched
(rac_kernels.matched_target) the same λ holds in the target and in the solver.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rac_engine.solve.method import Problem, Solution, register
from rac_kernels import admm_short_, refine

STEPS = 45
REFINING_STEPS = 20
TOLERANCE = 1e-2
TOGETHER = 1 << 26  # weights solved together, at most, where there is more than one matrix


@register("rac", "RAC Engine", needs="hessian")
def rac(problem: Problem) -> Solution:
    assert problem.gram is not None
    target = problem.target
    factor = problem.gram.borrow(target.damping)
    weight = torch.where(factor.dead, 1.0, factor.diagonal + factor.ridge)
    pruned, most = [], 0
    for rows, goal in _batches(problem):
        goal = goal.masked_fill(factor.dead, 0)
        masked = admm_short_(goal, factor, target.sparsity, target.pattern, STEPS, rows)
        refined, how = refine(
            masked,
            factor.U,
            goal,
            triangle="lower",
            diagonal=weight,
            iterations=REFINING_STEPS,
            tolerance=TOLERANCE,
        )
        pruned.append(refined)
        most = max(most, how.iterations)
    return Solution(pruned[0] if len(pruned) == 1 else torch.cat(pruned), factor.damping, STEPS + most)


def _batches(problem: Problem) -> Iterator[tuple[list[int], Tensor]]:
    """Matrices one after the other, as many together as TOGETHER allows: row counts, and the weights."""
    n, rows = problem.weights.shape[1], list[int]()
    first = 0
    for count in problem.rows:
        if rows and (sum(rows) + count) * n > TOGETHER:
            yield rows, problem.weights[first : first + sum(rows)]
            first, rows = first + sum(rows), []
        rows.append(count)
    yield rows, problem.weights[first:]
