"""Kept weights moved together until a block's outputs come nearest to those wanted: gradient steps by `MaskedAdam`.

The rate rises at first and falls to 0 along a cosine. Whoever tunes computes the outputs; here are the error, the
schedule and the steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from rac_kernels.solvers.adam import MaskedAdam
from rac_kernels.solvers.grid import Grid

RATE = 0.03  # of the first steps, by a weight's usual size; it falls to 0 along a cosine

WARMING = 0.05  # share of the steps in which the rate rises


def squared_error(found: Tensor, wanted: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """‖found − wanted‖² and ‖wanted‖², each token [tokens, n] with its weight [tokens] fp32 (None: 1 each).

    Both [] fp32, found being widened and wanted fp32. Gradients go through the first.
    """
    error = found.float() - wanted
    if weights is None:
        return error.square().sum(), wanted.square().sum()
    return error.square().sum(1) @ weights, wanted.square().sum(1) @ weights


def relative_error(parts: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Σ ‖found − wanted‖² / Σ ‖wanted‖² over what `squared_error` gives for each of the parts, added up in fp64.

    The numerator alone where the denominator is 0.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        sums += torch.stack(part).double().cpu()
    return float(sums[0] / sums[1]) if sums[1] else float(sums[0])


def rate_at(share: float) -> float:
    """The rate when that share of all tokens, 0 to 1, has been gone through."""
    return RATE * min(share / WARMING, 1) * (1 + math.cos(math.pi * share)) / 2


class Tuning:
    """Moves `weights`, fp32 matrices that require gradients, in place. What is zero at the start stays +0.0.

    `tokens` are how many will be gone through in all steps together. A matrix whose `grids` entry is not None stays on
    that grid: what moves is a copy of it, along the gradient at the grid's points nearest to the copy, which are what
    the matrix holds (the straight-through estimator, Bengio et al., arXiv 1308.3432).
    """

    def __init__(self, weights: Sequence[Tensor], tokens: int, grids: Sequence[Grid | None] | None = None) -> None:
        self._weights, self._tokens, self._seen = list(weights), tokens, 0
        self._grids = [None] * len(self._weights) if grids is None else list(grids)
        self._moved = [
            weight.detach() if grid is None else weight.detach().clone()
            for weight, grid in zip(self._weights, self._grids, strict=True)
        ]
        self._adam = MaskedAdam(self._moved)

    def step(self, missed: Tensor, whole: Tensor, tokens: int) -> None:
        """One step down the gradient of missed / whole (see `squared_error`), which came of so many tokens."""
        share = missed / whole.clamp(min=torch.finfo(whole.dtype).tiny)
        gradients = torch.autograd.grad(share, self._weights)
        self._seen += tokens
        with torch.no_grad():
            self._adam.step(gradients, rate_at(self._seen / self._tokens))
            for weight, moved, grid in zip(self._weights, self._moved, self._grids, strict=True):
                if grid is not None:
                    weight.copy_(grid.nearest(moved))


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of the weight in the dtype that it is stored in, zeros as +0.0 (rounding can leave −0.0)."""
    return weight.detach().to(dtype, copy=True).add_(0.0)
