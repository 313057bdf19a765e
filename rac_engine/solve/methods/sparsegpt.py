"""SparseGPT (Frantar, Alistarh, arXiv 2301.00774): unstructured with a threshold for each block of columns, or N:M."""

from __future__ import annotations

from rac_engine.solve.method import SOLVING, Arithmetic, LayerProblem, Method, Solution
from rac_kernels import sweep
from rac_kernels.ops import sweep as sweeping
from rac_kernels.ops.pattern import zeros_of


def solve(problem: LayerProblem) -> Solution:
    assert problem.gram is not None
    target = problem.target
    factor = problem.gram.factor(target.damping)
    pruned = sweep(
        problem.weights, factor.U, target.sparsity, target.pattern, target.block_size, factor.dead, problem.rows
    )
    return Solution(pruned, factor.damping)


def zeros(sparsity: float, rows: int, columns: int, block_size: int) -> int:
    whole, rest = divmod(columns, block_size)
    return whole * zeros_of(sparsity, rows * block_size) + zeros_of(sparsity, rows * rest)


METHOD = Method(
    name="sparsegpt",
    title="SparseGPT",
    needs="hessian",
    solve=solve,
    workspace=lambda stacked: {SOLVING: sweeping.workspace(stacked.weights, stacked.device)},
    arithmetic=Arithmetic("sweep", "rows · n²", lambda rows, n: sweeping.limit(rows, n).flops),
    exact_factor=True,
    zeros=zeros,
    does="which corrects the weights that stay",
    knobs=("block_size", "damping"),
    learns=14,  # benchmarks/tokens.py
)
