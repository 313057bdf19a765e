"""Magnitude pruning: the smallest weights of each matrix go."""

from __future__ import annotations

import torch

from rac_engine.solve.method import SOLVING, LayerProblem, Method, Solution
from rac_kernels import mask_by_score, zeroed
from rac_kernels.ops import select


def solve(problem: LayerProblem) -> Solution:
    target = problem.target
    masks = [
        mask_by_score(weight.float().abs(), target.sparsity, target.pattern, per="matrix")
        for weight in problem.weights.split(problem.rows)
    ]
    return Solution(zeroed(problem.weights, torch.cat(masks)))


METHOD = Method(
    name="magnitude",
    title="magnitude pruning",
    needs="nothing",
    solve=solve,
    workspace=lambda stacked: {SOLVING: select.workspace(stacked.largest, per="matrix")},
)
