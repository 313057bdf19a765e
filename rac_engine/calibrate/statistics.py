"""Statistics of an input: the Hessian or its diagonal, and what matches the pruned model with the dense one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rac_engine.solve import Needs
from rac_kernels import (
    blend_,
    column_norm_accumulate_,
    cross_accumulate_,
    finite_tokens,
    hessian_accumulate_,
    squared_norm_accumulate_,
)


def statistic_bytes(columns: int, needs: Needs) -> int:
    """Bytes of a `Statistic` of an input of so many columns."""
    return {"hessian": 4 * columns**2, "norms": 4 * columns, "nothing": 0}[needs]


def match_bytes(columns: int, rows: int | None) -> int:
    """Bytes of `DenseOutputs` of a matrix with so many rows; without rows, of `DenseInputs`."""
    return 8 * columns**2 if rows is None else 4 * columns * rows


class Statistic:
    """The Hessian H = Σ w x xᵀ of an input, or its diagonal only.

    `value` is fp32, [columns, columns] (upper triangle) or [columns]; `tokens` are the tokens counted, `dropped` those
    left out because they hold NaN or Inf, which would spoil all of H. `match` gathers what the dense model has in the
    same place, where its outputs are to be reconstructed. `held` is the same of the tokens that are held out, which are
    not counted here.
    """

    def __init__(
        self,
        columns: int,
        full: bool,
        device: str,
        match: DenseInputs | DenseOutputs | None = None,
        held: Statistic | None = None,
    ) -> None:
        self.value = torch.zeros((columns, columns) if full else columns, dtype=torch.float32, device=device)
        self.match, self.held = match, held
        self.tokens = self.dropped = 0
        self._accumulate = hessian_accumulate_ if full else column_norm_accumulate_

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """Count tokens x [tokens, columns], with weights [tokens] fp32 or 1 each."""
        self._count(*finite_tokens(weights, x))

    def add_matched(self, given: Tensor, others: Sequence[Tensor], weights: Tensor | None) -> None:
        """Count tokens `given` [tokens, columns] here, and in `match` together with the `others` that its `add` takes.

        All solvers rely on H and C being of the same tokens: one that is not finite in either model counts in neither.
        """
        (given, *others), weights, dropped = finite_tokens(weights, given, *others)
        self._count([given], weights, dropped)
        assert self.match is not None
        self.match.add(given, *others, weights=weights)

    def _count(self, parts: Sequence[Tensor], weights: Tensor | None, dropped: int) -> None:
        (x,) = parts
        self.dropped += dropped
        self.tokens += len(x)
        if len(x):
            self._accumulate(self.value, x, weights)

    def blend(self, other: Statistic, weight: float) -> None:
        """Add `weight` times another's sums, which stay as they are."""
        blend_(self.value, other.value, weight)
        if isinstance(self.match, DenseInputs) and isinstance(other.match, DenseInputs):
            self.match.blend(other.match, weight)


class DenseInputs:
    """The match of a group's inputs X′ in the pruned model with the inputs X that the same group has in the dense one.

    `cross` is X′ᵀX [columns, columns], `gram` is XᵀX (upper triangle), both fp32, each token counted with its weight.
    """

    def __init__(self, columns: int, device: str) -> None:
        self.cross = torch.zeros(columns, columns, dtype=torch.float32, device=device)
        self.gram = torch.zeros_like(self.cross)

    def add(self, given: Tensor, dense: Tensor, *, weights: Tensor | None) -> None:
        """Count tokens, all of them finite: inputs [tokens, columns] of the pruned model and of the dense one."""
        cross_accumulate_(self.cross, given, dense, weights)
        hessian_accumulate_(self.gram, dense, weights)

    def blend(self, other: DenseInputs, weight: float) -> None:
        """Add `weight` times another's sums, which stay as they are."""
        blend_(self.cross, other.cross, weight)
        blend_(self.gram, other.gram, weight)


class DenseOutputs:
    """The match of a matrix's inputs X′ with the outputs Y that are wanted of it.

    `cross` is X′ᵀY [columns, rows] fp32; `wanted` is ‖Y‖², `by_row` [rows] fp32 its parts, `dense` the squared norm of
    the dense matrix's outputs.
    """

    def __init__(self, columns: int, rows: int, device: str) -> None:
        self.cross = torch.zeros(columns, rows, dtype=torch.float32, device=device)
        self.by_row = torch.zeros(rows, dtype=torch.float32, device=device)
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)

    @property
    def wanted(self) -> float:
        """‖Y‖² of the outputs that are wanted."""
        return float(self._squares[0])

    @property
    def dense(self) -> float:
        """The squared norm of the dense matrix's outputs."""
        return float(self._squares[1])

    def add(self, given: Tensor, wanted: Tensor, dense: Tensor, *, weights: Tensor | None) -> None:
        """Count tokens, all of them finite: inputs [tokens, columns], wanted and dense outputs [tokens, rows]."""
        cross_accumulate_(self.cross, given, wanted, weights)
        column_norm_accumulate_(self.by_row, wanted, weights)
        for place, outputs in enumerate((wanted, dense)):
            squared_norm_accumulate_(self._squares[place], outputs, weights)
