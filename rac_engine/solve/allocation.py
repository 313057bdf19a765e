"""A sparsity for each matrix, so that the model as a whole is as sparse as was asked for.

Nothing here touches weights: it goes by their score profiles (`rac_kernels.score_profile`) and counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from rac_engine.solve.methods import find_method
from rac_kernels.ops.profile import BINS_AN_OCTAVE, LOWEST, ScoreProfile

_STEPS = 100  # of a bisection: more than doubles can tell apart


def within(sparsity: float, most: float) -> tuple[float, float]:
    """The least and the largest sparsity of a matrix: at most `most` from the model's, and never all of it."""
    reach = min(most, sparsity, (1 - sparsity) / 2)
    return sparsity - reach, sparsity + reach


def levelled(profiles: Sequence[ScoreProfile], sparsity: float, most: float) -> list[float]:
    """Sparsities at which the next weight to go costs all inputs the same share of their outputs.

    A weight's marginal cost is z = w² h_jj over the sum of that for all weights of the input, so that inputs of any
    scale compare. One τ is found such that the shares of weights with z <= τ, held within `most` of `sparsity`, add up
    to the model's. An input that saw nothing (Σ w² h_jj = 0) gets the model's own sparsity.
    """
    least, largest = within(sparsity, most)
    curves = [_share_below(profile) for profile in profiles]
    total = sum(profile.count for profile in profiles)

    def shares(log2_cost: float) -> list[float]:
        return [sparsity if curve is None else min(max(curve(log2_cost), least), largest) for curve in curves]

    low, high = -1024.0, 1024.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        asked = math.fsum(share * profile.count for share, profile in zip(shares(middle), profiles, strict=True))
        low, high = (middle, high) if asked < sparsity * total else (low, middle)
    return shares(high)


def _share_below(profile: ScoreProfile) -> Callable[[float], float] | None:
    """The share of weights with log2 z at most what is given, linear within a bin; None where nothing is known."""
    if not profile.total > 0:
        return None
    sums = torch.cat([torch.zeros(1, dtype=torch.int64), profile.histogram.cumsum(0)])
    offset = math.log2(profile.total) - LOWEST

    def share(log2_cost: float) -> float:
        place = min(max((log2_cost + offset) * BINS_AN_OCTAVE, 0.0), float(len(profile.histogram)))
        bin_ = min(int(place), len(profile.histogram) - 1)
        below, upto = int(sums[bin_]), int(sums[bin_ + 1])
        return (profile.zeros + below + (place - bin_) * (upto - below)) / profile.count

    return share


def zeros_at(method: str, sparsity: float, rows: int, columns: int, block_size: int) -> int:
    """Zeros that a method makes of a matrix [rows, columns] at that sparsity."""
    return find_method(method).zeros(sparsity, rows, columns, block_size)


def settled(
    sparsities: Sequence[float],
    shapes: Sequence[Sequence[tuple[int, int]]],
    method: str,
    block_size: int,
    sparsity: float,
    most: float,
) -> list[float]:
    """`sparsities` moved a little, so that the zeros that the method will make add up to the model's `sparsity`.

    `shapes` are rows and columns of the matrices that have each of the sparsities. All move alike until the next step
    would make too many zeros, then one after the other takes that step while the sum comes nearer: what is left is
    less than the smallest step of those.
    """
    least, largest = within(sparsity, most)
    wanted = round(sparsity * sum(rows * columns for group in shapes for rows, columns in group))

    def moved(by: float) -> list[float]:
        return [min(max(share + by, least), largest) for share in sparsities]

    def zeros(share: float, group: Sequence[tuple[int, int]]) -> int:
        return sum(zeros_at(method, share, rows, columns, block_size) for rows, columns in group)

    def total(shares: list[float]) -> int:
        return sum(zeros(share, group) for share, group in zip(shares, shapes, strict=True))

    low, high = -2 * most, 2 * most
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if total(moved(middle)) <= wanted else (low, middle)
    final, above = moved(low), moved(high)
    left = wanted - total(final)
    for number, group in enumerate(shapes):
        step = zeros(above[number], group) - zeros(final[number], group)
        if step and abs(left - step) < abs(left):
            final[number], left = above[number], left - step
    return final
