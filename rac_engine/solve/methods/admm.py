"""The engine's own: a short ADMM finds the mask, then the weights become the best there are on it.

Where ALPS decomposes H and goes on until the mask stands still, this one inverts H with four values of the penalty, in
the memory that H has, and takes a fixed number of steps, their products of numbers of two bytes (benchmarks/solvers.py
holds both). The cost of H + λI is what is minimised throughout, so with outputs matched (rac_kernels.matched_target)
the same λ holds in the target and in the solver.
"""

from __future__ import annotations

from rac_engine.solve.method import LayerProblem, Method, Solution
from rac_kernels import admm_, refine, symmetrize_

STEPS = 36

REFINING_STEPS = 7

TOLERANCE = 1e-2


def solve(problem: LayerProblem) -> Solution:
    assert problem.gram is not None
    target = problem.target
    factor = problem.gram.borrow(target.damping)
    goal = problem.weights.masked_fill(factor.dead, 0)
    masked = admm_(goal, factor, target.sparsity, target.pattern, STEPS, problem.rows)
    H = factor.U  # used up: H + λI again, of which all but the diagonal lies below it
    symmetrize_(H.T)
    H.diagonal().copy_(factor.damped)
    refined, how = refine(masked, H, goal, iterations=REFINING_STEPS, tolerance=TOLERANCE)
    return Solution(refined, factor.damping, STEPS + how.iterations)


METHOD = Method(name="admm", title="ADMM and masked least squares", needs="hessian", solve=solve)
