"""The engine's own: a short ADMM finds the mask, then the weights become the best there are on it.

Where ALPS decomposes H and takes its time, this one factors H + ρI anew for each of a few penalties ρ; its masks are as
good within a per cent (benchmarks/solvers.py). The cost of H + λI is what is minimised throughout, so with outputs
matched (rac_kernels.matched_target) the same λ holds in the target and in the solver.
"""

from __future__ import annotations

import torch

from rac_engine.solve.method import Problem, Solution, register
from rac_kernels import admm_short, refine

STEPS = 30
REFINING_STEPS = 20
TOLERANCE = 1e-2


@register("rac", "RAC Engine", needs="hessian")
def rac(problem: Problem) -> Solution:
    assert problem.gram is not None
    target, goal = problem.target, problem.weights
    factor = problem.gram.factor(target.damping)
    H = problem.gram.full()
    H.diagonal().copy_(torch.where(factor.dead, 1.0, factor.diagonal + factor.ridge))
    goal = goal.masked_fill(factor.dead, 0)
    masked = admm_short(goal, H, target.sparsity, target.pattern, STEPS, problem.rows)
    refined, how = refine(masked, H, goal, masked != 0, iterations=REFINING_STEPS, tolerance=TOLERANCE)
    return Solution(refined, factor.damping, STEPS + how.iterations)
