"""The damping that fits an input best, chosen by what its matrices give for tokens that are held out.

λ = damping · mean(H_ii) holds the pruned weights near the dense ones. With too little of it they fit the calibration's
tokens alone; with too much they learn less than the tokens could teach. What is right depends on the input's spectrum,
on the number of tokens and on how much is pruned, so it is measured: a sample of the rows is pruned with several
dampings by the method itself, and judged by the outputs for the tokens held out. Of two that are as good the larger is
taken: other tokens differ more. Rows depend on each other by their threshold alone, so what is best for a sample is
best for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rac_engine.solve.method import Arithmetic, Gram, LayerProblem, Method, Target
from rac_engine.solve.outputs import HeldOut, Outputs
from rac_kernels import matched_target, objective, reconstruction_error, squared_outputs
from rac_kernels.ops import factor

PATH = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

FIRST = PATH.index(0.03)

SAME = 0.005  # errors that differ by no more are the same, and the larger damping is the safer

SHARE = 8  # one of so many rows is tried,

FEWEST_ROWS, MOST_ROWS = 64, 512  # but of a matrix at least and at most so many

TRIES = 3  # dampings, in the mean

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
    """The damping that the matrices are to have, and the relative error on the tokens held out of each that was tried.

    H stays as it is. Takes the method's time for a sample of the rows, two or more times. Where the squares of the
    outputs to match are not known, errors are not either, and the damping is the target's.
    """
    picked = [
        torch.arange(count, device=weight.device) * len(weight) // max(count, 1)
        for weight, count in ((weight, tried_rows(len(weight))) for weight in trial.weights)
    ]
    some = [weight[rows] for weight, rows in zip(trial.weights, picked, strict=True)]
    counts, dense, held = [len(part) for part in some], torch.cat(some), trial.held
    aim = None if trial.outputs is None else trial.outputs.of_rows(dense, picked)
    wanted = None if held.outputs is None else held.outputs.of_rows(dense, picked)
    power = 0.0 if held.outputs is None else held.outputs.power_of_rows(dense, picked)
    whole = squared_outputs(dense, held.gram)
    if power is None or not whole:
        return target.damping, {}

    def error(place: int) -> float:
        goal, damping = dense, PATH[place]
        if aim is not None:
            goal = matched_target(trial.gram.factor(damping, exact=method.exact_factor), aim, dense)
        pruned = method.solve(LayerProblem(goal, counts, replace(target, damping=damping), trial.gram)).weight
        if wanted is None:
            return objective(dense, pruned, held.gram) / whole
        return reconstruction_error(pruned, held.gram, wanted, power) / whole

    place, errors = settle(error, FIRST, len(PATH))
    return PATH[place], {PATH[tried]: errors[tried] for tried in sorted(errors)}


def settle(error: Callable[[int], float], first: int, count: int) -> tuple[int, dict[int, float]]:
    """A place in 0 … `count` − 1 with a low error, and the errors of all places that were asked for.

    From `first` it goes up as long as the error is not worse than the least so far by more than SAME, or else down as
    long as every step makes it better by more than that. An error that is no number is infinite.
    """
    errors: dict[int, float] = {}

    def at(place: int) -> float:
        if place not in errors:
            found = error(place)
            errors[place] = found if found == found else math.inf
        return errors[place]

    here = first
    at(here)
    while here + 1 < count and at(here + 1) <= min(errors.values()) * (1 + SAME):
        here += 1
    while 0 < here <= first and at(here - 1) * (1 + SAME) < at(here):
        here -= 1
    return here, errors


def tried_rows(rows: int) -> int:
    """Rows of a matrix that are tried, of so many."""
    return min(rows, max(FEWEST_ROWS, min(rows // SHARE, MOST_ROWS)))


def choosing_flops(rows: int, n: int, arithmetic: Arithmetic) -> float:
    """FLOPs of choosing for matrices of so many rows in all and n columns, by the method's `arithmetic`."""
    tried = tried_rows(rows)
    return TRIES * (arithmetic.flops(tried, n) + factor.limit(n).flops + 4.0 * tried * n * n)
