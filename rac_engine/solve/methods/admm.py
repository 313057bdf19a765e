"""The engine's own: a short ADMM finds the mask, then the weights become the best there are on it.

Where ALPS decomposes H and goes on until the mask stands still, this one inverts H with four values of the penalty, in
the memory that H has, and takes a fixed number of steps, their products of numbers of two bytes (benchmarks/solvers.py
holds both). The cost of H + λI is what is minimised throughout, so with outputs matched (rac_kernels.matched_target)
the same λ holds in the target and in the solver.
"""

from __future__ import annotations

import math

from rac_engine.solve.method import SOLVING, Arithmetic, LayerProblem, Method, Solution, Stacked
from rac_kernels import admm_, refine, symmetrize_
from rac_kernels.solvers import admm
from rac_kernels.solvers import refine as refining

STEPS = 36

REFINING_STEPS = 7

TOLERANCE = 1e-2

LEFT = 12  # bytes a weight: what ADMM was given and gives, beside the refined ones


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


def workspace(stacked: Stacked) -> dict[str, int]:
    searching = admm.workspace(stacked.weights, stacked.columns, stacked.device)
    rows, kept = stacked.weights // stacked.columns, math.ceil((1 - stacked.sparsity) * stacked.columns)
    improving = refining.workspace(rows, stacked.columns, kept, REFINING_STEPS, stacked.device)
    return {SOLVING: max(searching, LEFT * stacked.weights + improving)}


PRODUCTS = STEPS - 1 + REFINING_STEPS + 2  # none in the first step; two of refine measure

METHOD = Method(
    name="admm",
    title="ADMM and masked least squares",
    needs="hessian",
    solve=solve,
    workspace=workspace,
    arithmetic=Arithmetic(
        "mask and weights",
        f"{PRODUCTS} · 2 · rows · n² + {admm.inversions(STEPS)} · n³",
        lambda rows, n: 2.0 * rows * n * n * PRODUCTS + n**3 * admm.inversions(STEPS),
    ),
    knobs=("damping",),
    damped_by_error=True,
    reconstruct="residual",
    learns=53,  # benchmarks/tokens.py
    epochs=10,
    reorders=True,
)
