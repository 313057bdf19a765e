"""ALPS (Meng, Behdin, Wang, Mazumder, NeurIPS 2024, arXiv 2406.07831), every matrix by itself.

ADMM with an ℓ0 constraint on H scaled to a unit diagonal, at most 300 steps, its penalty raised as the support settles;
then at most 10 steps of conjugate gradients on the support that it found.
"""

from __future__ import annotations

import torch

from rac_engine.solve.method import LayerProblem, Method, Solution
from rac_kernels import alps, refine

STEPS = 300

REFINING_STEPS = 10


def solve(problem: LayerProblem) -> Solution:
    assert problem.gram is not None
    target, H = problem.target, problem.gram.full()
    ridge = problem.gram.ridge  # of the factor, where outputs were matched under it
    if ridge is None:
        ridge = target.damping * float(H.diagonal().mean())
    H.diagonal().add_(ridge)
    pruned, most = [], 0
    parts = problem.weights.split(problem.rows)
    found = alps(parts, H, target.sparsity, target.pattern, STEPS)
    for weight, (masked, steps) in zip(parts, found, strict=True):
        refined, _ = refine(
            masked, H, weight, masked != 0, iterations=REFINING_STEPS, tolerance=0.0, method="gradients"
        )
        pruned.append(refined)
        most = max(most, steps)
    return Solution(torch.cat(pruned), target.damping, most + REFINING_STEPS, ridge=ridge)


METHOD = Method(name="alps", title="ALPS", needs="hessian", solve=solve)
