"""Wanda (Sun, Liu, Bair, Kolter, arXiv 2306.11695): |W|·‖x‖₂, compared within each output row."""

from __future__ import annotations

from rac_engine.solve.method import SOLVING, LayerProblem, Method, Solution
from rac_kernels import mask_by_score
from rac_kernels.ops import select
from rac_kernels.ops.pattern import zeros_of


def solve(problem: LayerProblem) -> Solution:
    assert problem.norms is not None
    scores = problem.weights.float().abs() * problem.norms.sqrt()
    mask = mask_by_score(scores, problem.target.sparsity, problem.target.pattern, per="row")
    return Solution(problem.weights.masked_fill(mask, 0))


METHOD = Method(
    name="wanda",
    title="Wanda",
    needs="norms",
    solve=solve,
    workspace=lambda stacked: {SOLVING: select.workspace(stacked.weights, per="row")},
    zeros=lambda sparsity, rows, columns, _: rows * zeros_of(sparsity, columns),
)
