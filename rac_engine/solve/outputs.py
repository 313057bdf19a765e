"""Outputs of the dense model that pruned matrices are to give, and the tokens by which what they give is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_kernels import all_finite, output_cross, reconstruction_error, reported_objective, squared_outputs

FEWEST_TOKENS = 256  # that are held out, with fewer of which nothing can be chosen


@dataclass(frozen=True)
class Outputs:
    """Outputs of the dense model that the pruned one's matrices, stacked, are to give."""

    cross: Tensor
    """fp32: C = X′ᵀY [columns, rows], of inputs X′ of the pruned model and outputs Y of the dense one; or X′ᵀX."""
    power: list[float]
    """‖Y‖² of each matrix: what is to be given again."""
    dense: list[float]
    """‖X Wᵀ‖² of each matrix: what the dense one gave."""
    shared: bool = False
    """Whether `cross` is X′ᵀX [columns, columns], of inputs: C follows from it for any number of matrices."""
    gram: Tensor | None = None
    """Of shared ones XᵀX [columns, columns] (upper triangle), where it is known."""
    by_row: Tensor | None = None
    """Of others ‖Y‖² of each row [rows], where it is known."""

    @classmethod
    def of_inputs(cls, cross: Tensor, gram: Tensor, weights: Sequence[Tensor]) -> Outputs:
        """Outputs Y = X Wᵀ by the inputs of both models: X′ᵀX [columns, columns] and XᵀX (upper triangle)."""
        powers = [squared_outputs(weight, gram) for weight in weights]
        return cls(cross, powers, powers, shared=True, gram=gram)

    def of(self, weight: Tensor) -> Tensor:
        """C [columns, rows] of a dense matrix [rows, columns], the only one unless inputs are known."""
        return output_cross(self.cross, weight) if self.shared else self.cross

    def of_rows(self, weight: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """C [columns, rows in all] of `rows` of each matrix, of which `weight` is made [rows in all, columns]."""
        return output_cross(self.cross, weight) if self.shared else self.cross[:, rows[0]]

    def power_of_rows(self, weight: Tensor, rows: Sequence[Tensor]) -> float | None:
        """‖Y‖² of the same rows; None where it is not known."""
        if self.shared:
            return None if self.gram is None else squared_outputs(weight, self.gram)
        return None if self.by_row is None else float(self.by_row[rows[0]].sum(dtype=torch.float64))

    @property
    def finite(self) -> bool:
        """Whether all that is known is finite."""
        return all_finite(self.cross) and all(map(math.isfinite, self.power))


@dataclass(frozen=True)
class HeldOut:
    """What is known of an input from tokens that no solver learns from."""

    gram: Tensor
    """H = XᵀX of those tokens [columns, columns] fp32, upper triangle."""
    outputs: Outputs | None
    """The dense model's outputs on them, where these are matched."""
    tokens: int
    """Tokens that count."""

    @property
    def says_something(self) -> bool:
        """Whether anything can be judged by them: there are some, and all sums are finite."""
        finite = all_finite(self.gram) and (self.outputs is None or self.outputs.finite)
        return self.tokens > 0 and finite and bool(self.gram.diagonal().any())

    @property
    def tells(self) -> bool:
        """Whether there are enough of them to choose by: an expert may have been sent few."""
        return self.tokens >= FEWEST_TOKENS

    def error(self, weight: Tensor, pruned: Tensor, number: int) -> tuple[float, float]:
        """The squared error of a pruned matrix's outputs, and the square of the dense one's.

        `weight` and `pruned` are [rows, columns], any float dtype; `number` is the matrix's place among those whose
        `outputs` are known.
        """
        if self.outputs is None:
            return reported_objective(weight, pruned, self.gram), squared_outputs(weight, self.gram)
        own, cross = squared_outputs(pruned, self.gram), self.outputs.of(weight)
        return (
            reconstruction_error(pruned, self.gram, cross, self.outputs.power[number], own=own),
            self.outputs.dense[number],
        )


@dataclass(frozen=True)
class Judge:
    """Judges what a method makes of stacked matrices by tokens that it does not learn from."""

    held: HeldOut
    weights: list[Tensor]
    """The dense matrices [rows, columns], in the order in which they are stacked."""
    numbers: list[int]
    """The place of each among those whose outputs are known."""

    def errors(self, stacked: Tensor) -> list[float]:
        """The relative error of each matrix in `stacked` [rows of all, columns], a candidate of any float dtype."""
        parts = stacked.split([len(weight) for weight in self.weights])
        found = [
            self.held.error(weight, part, number)
            for weight, part, number in zip(self.weights, parts, self.numbers, strict=True)
        ]
        return [cost / whole if whole else 0.0 for cost, whole in found]
