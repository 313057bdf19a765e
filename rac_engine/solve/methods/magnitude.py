"""Magnitude pruning: the smallest weights of each matrix go."""

from __future__ import annotations

import torch

from rac_engine.solve.method import Problem, Solution, register
from rac_kernels import mask_by_score


@register("magnitude", "magnitude pruning", needs="nothing")
def magnitude(problem: Problem) -> Solution:
    target = problem.target
    masks = [
        mask_by_score(weight.float().abs(), target.sparsity, target.pattern, per="matrix")
        for weight in problem.weights.split(problem.rows)
    ]
    return Solution(problem.weights.masked_fill(torch.cat(masks), 0))
