"""ALPS (Meng, Behdin, Wang, Mazumder, NeurIPS 2024, arXiv 2406.07831), every matrix by itself.

ADMM with an ℓ0 constraint on H scaled to a unit diagonal, at most 300 steps, its penalty raised as the support settles;
then at most 10 steps of conjugate gradients on the support that it found.
"""

from __future__ import annotations

import math

import torch

from rac_engine.solve.method import SOLVING, Arithmetic, LayerProblem, Method, Solution, Stacked
from rac_kernels import refine
from rac_kernels.solvers import alps as solver
from rac_kernels.solvers import refine as refining

STEPS = 300

REFINING_STEPS = 10

LEFT = 12  # bytes a weight: what ADMM was given and gives, beside the refined ones


def solve(problem: LayerProblem) -> Solution:
    assert problem.gram is not None
    target, H = problem.target, problem.gram.full()
    ridge = problem.gram.ridge  # of the factor, where outputs were matched under it
    if ridge is None:
        ridge = target.damping * float(H.diagonal().mean())
    H.diagonal().add_(ridge)
    pruned, most = [], 0
    parts = problem.weights.split(problem.rows)
    found = solver.alps(parts, H, target.sparsity, target.pattern, STEPS)
    for weight, (masked, steps) in zip(parts, found, strict=True):
        refined, _ = refine(
            masked, H, weight, masked != 0, iterations=REFINING_STEPS, tolerance=0.0, method="gradients"
        )
        pruned.append(refined)
        most = max(most, steps)
    return Solution(torch.cat(pruned), target.damping, most + REFINING_STEPS, ridge=ridge)


def workspace(stacked: Stacked) -> dict[str, int]:
    n = stacked.columns
    rows, kept = stacked.weights // n, math.ceil((1 - stacked.sparsity) * n)
    improving = refining.workspace(rows, n, kept, REFINING_STEPS, stacked.device, method="gradients")
    return {
        "H, scaled, its eigenvectors and an inverse": solver.held(n),
        SOLVING: max(solver.workspace(stacked.weights, n), LEFT * stacked.weights + improving),
    }


def flops(rows: int, n: int) -> float:
    steps = STEPS * (2.0 * rows * n * n + 2.0 * n**3 / solver.CHECK)
    return refining.limit(rows, n, REFINING_STEPS).flops + steps


METHOD = Method(
    name="alps",
    title="ALPS",
    needs="hessian",
    solve=solve,
    workspace=workspace,
    arithmetic=Arithmetic("mask and weights", f"{STEPS} · (2 · rows · n² + 2 · n³ / {solver.CHECK}) at most", flops),
    exact_factor=True,
    knobs=("damping",),
)
