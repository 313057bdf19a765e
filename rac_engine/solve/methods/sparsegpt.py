"""SparseGPT (Frantar, Alistarh, arXiv 2301.00774): unstructured with a threshold for each block of columns, or N:M."""

from __future__ import annotations

from rac_engine.solve.method import LayerProblem, Method, Solution
from rac_kernels import sweep


def solve(problem: LayerProblem) -> Solution:
    assert problem.gram is not None
    target = problem.target
    factor = problem.gram.factor(target.damping)
    pruned = sweep(
        problem.weights, factor.U, target.sparsity, target.pattern, target.block_size, factor.dead, problem.rows
    )
    return Solution(pruned, factor.damping)


METHOD = Method(name="sparsegpt", title="SparseGPT", needs="hessian", solve=solve)
