"""The damping that fits an input best, chosen by what its matrices give for tokens that are held out.

λ = damping · mean(H_ii) holds the pruned weights near the dense ones. With too little of it they fit the calibration's
tokens alone; with too much they learn less than the tokens could teach. What is right depends on the input's spectrum,
on the number of tokens and on how much is pruned, so it is measured: a sample of the rows is pruned with several
dampings by the method itself, and the one is taken with which the outputs for the tokens held out are best. Rows depend
on each other by their threshold alone, so what is best for a sample is best for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rac_engine.solve.method import Arithmetic, Gram, LayerProblem, Method, Target
from rac_engine.solve.outputs import HeldOut, Outputs
from rac_kernels import matched_target, objective, squared_outputs
from rac_kernels.ops import factor

PATH = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

FIRST = PATH.index(0.03)

SHARE = 8  # one of so many rows is tried,

FEWEST_ROWS, MOST_ROWS = 64, 512  # but of a matrix at least and at most so many

TRIES = 4  # dampings, in the mean

CHOOSING = f"some {TRIES} tried on a sample of the rows"
"""The rule of `choosing_flops` in words."""


@dataclass(frozen=True)
class Trial:
    """Matrices that share their input and a target, whose damping is to be chosen."""

    weights: list[Tensor]
    """The dense matrices [rows, columns]."""
    gram: Gram
    outputs: Outputs | None
    """The dense model's outputs on the tokens that the method learns from, where they are matched."""
    held: HeldOut


def choose_damping(trial: Trial, method: Method, target: Target) -> tuple[float, dict[float, float]]:
    """The damping with which the matrices are best for the tokens held out, and by how much others are worse.

    That is by damping, of all that were tried: the squared error on the tokens held out beyond that of the best one, as
    a share of the dense outputs. H stays as it is. Takes the method's time for a sample of the rows, three times at
    least.
    """
    picked = [
        torch.arange(count, device=weight.device) * len(weight) // max(count, 1)
        for weight, count in ((weight, tried_rows(len(weight))) for weight in trial.weights)
    ]
    some = [weight[rows] for weight, rows in zip(trial.weights, picked, strict=True)]
    counts, dense = [len(part) for part in some], torch.cat(some)
    aim = None if trial.outputs is None else trial.outputs.of_rows(dense, picked)
    other = None if trial.held.outputs is None else trial.held.outputs.of_rows(dense, picked)

    def cost(damping: float) -> float:
        goal = dense
        if aim is not None:
            goal = matched_target(trial.gram.factor(damping, exact=method.exact_factor), aim, dense)
        pruned = method.solve(LayerProblem(goal, counts, replace(target, damping=damping), trial.gram)).weight
        if other is None:
            return objective(dense, pruned, trial.held.gram)
        return squared_outputs(pruned, trial.held.gram) - 2 * float((pruned.double() * other.T.double()).sum())

    costs = {PATH[at]: found for at, found in lowest(lambda at: cost(PATH[at]), FIRST, len(PATH)).items()}
    best, whole = min(costs, key=lambda damping: costs[damping]), squared_outputs(dense, trial.held.gram)
    return best, {damping: (costs[damping] - costs[best]) / whole if whole else 0.0 for damping in sorted(costs)}


def lowest(cost: Callable[[int], float], first: int, count: int) -> dict[int, float]:
    """The costs of the places in 0 … `count` − 1 that are asked for on the way down from `first` and the one above it.

    It ends at a place both of whose neighbours cost as much or more. A cost that is no number is infinite.
    """
    known: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in known:
            found = cost(place)
            known[place] = found if found == found else float("inf")
        return known[place]

    here, step = first, 1
    if first + 1 >= count or at(first + 1) >= at(first):
        step = -1
    while 0 <= here + step < count and at(here + step) < at(here):
        here += step
    return known


def tried_rows(rows: int) -> int:
    """Rows of a matrix that are tried, of so many."""
    return min(rows, max(FEWEST_ROWS, min(rows // SHARE, MOST_ROWS)))


def choosing_flops(rows: int, n: int, arithmetic: Arithmetic) -> float:
    """FLOPs of choosing for matrices of so many rows in all and n columns, by the method's `arithmetic`."""
    tried = tried_rows(rows)
    return TRIES * (arithmetic.flops(tried, n) + factor.limit(n).flops + 4.0 * tried * n * n)
