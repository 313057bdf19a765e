"""Wanda (Sun, Liu, Bair, Kolter, arXiv 2306.11695): |W|·‖x‖₂, compared within each output row.

The published code takes floor(s · columns) weights of every row, which at 60% of 576 columns makes 59.9%. Here some
rows, at even distances, lose one more, so that the matrix has floor(s · rows · columns) zeros. Still nothing is
compared between rows.
"""

from __future__ import annotations

import torch

from rac_engine.solve.method import SOLVING, LayerProblem, Method, Solution
from rac_kernels import mask_by_score
from rac_kernels.ops import select


def solve(problem: LayerProblem) -> Solution:
    assert problem.norms is not None
    target, norms = problem.target, problem.norms.sqrt()
    masks = [
        mask_by_score(weight.float().abs() * norms, target.sparsity, target.pattern, per="row")
        for weight in problem.weights.split(problem.rows)
    ]
    return Solution(problem.weights.masked_fill(torch.cat(masks), 0))


METHOD = Method(
    name="wanda",
    title="Wanda",
    needs="norms",
    solve=solve,
    # One matrix's scores at a time, beside the masks of all.
    workspace=lambda stacked: {SOLVING: select.workspace(stacked.largest, per="row") + stacked.weights},
)
