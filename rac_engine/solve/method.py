"""A method's parts: a function that is given a `LayerProblem` and returns a `Solution`, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rac_engine.solve.outputs import Judge
from rac_kernels import Factor, factor_, symmetrize_
from rac_kernels.ops.pattern import zeros_of

Needs = Literal["hessian", "norms", "nothing"]

SOLVING = "fp32 working copies"
"""The name in plans for a solver's bytes that need none of their own."""


DAMPING = 0.01
"""The published damping, where none is given and none is chosen."""


@dataclass(frozen=True)
class Target:
    """The sparsity or pattern asked of a matrix, and the solvers' knobs."""

    sparsity: float = 0.5
    pattern: str | None = None
    damping: float = DAMPING
    block_size: int = 128
    chooses: bool = False
    """Whether another damping may be chosen by tokens that are held out (`Method.damped_by_error`)."""
    values: str = "same"
    """What kept weights are stored as: in the matrix's dtype (same), or on a grid of int8, int4 or int3."""

    @property
    def prunes(self) -> bool:
        """Whether any weight is to go."""
        return self.pattern is not None or self.sparsity > 0


class Gram:
    """H = XᵀX [n, n] of an input, with the factor of H + λI in the same memory once one is asked for.

    `H` is fp32 with contiguous rows; its upper triangle is read, and all of it is used up.
    """

    def __init__(self, H: Tensor) -> None:
        self._H = H
        self._factor: Factor | None = None
        self._asked = 0.0
        self._lent = False

    def factor(self, damping: float, exact: bool = True) -> Factor:
        """H + λI = U Uᵀ, U in the upper triangle and H in the strictly lower one (see `rac_kernels.Factor`)."""
        if self._factor is None or self._asked != damping or self._lent:
            if self._factor is not None:
                self.upper()
            if not self._H.is_contiguous():  # what `upper` has left is transposed: mirrored, it may be turned back
                self._H = symmetrize_(self._H).T
            self._factor, self._asked, self._lent = factor_(self._H, damping, exact=exact), damping, False
        return self._factor

    def borrow(self, damping: float) -> Factor:
        """The same factor for a method that overwrites U, though not what lies below: the next `factor` makes it anew.

        Such a method wants to know that H + λI has a factor, more than its last digits.
        """
        factor = self.factor(damping, exact=False)
        self._lent = True
        return factor

    @property
    def diagonal(self) -> Tensor:
        """[n]: H's own diagonal."""
        return self._H.diagonal() if self._factor is None else self._factor.diagonal

    def full(self) -> Tensor:
        """A copy of H, both triangles."""
        if self._factor is None:
            return symmetrize_(self._H.clone())
        copy = self._H.tril(-1)
        copy += copy.T.clone()
        copy.diagonal().copy_(self._factor.diagonal)
        return copy

    def upper(self) -> Tensor:
        """H again, in the upper triangle of what is returned. A factor made before is gone."""
        if self._factor is not None:
            restored = self._H.T
            restored.diagonal().copy_(self._factor.diagonal)
            self._H, self._factor = restored, None
        return self._H

    @property
    def ridge(self) -> float | None:
        """λ of the factor, if one was made."""
        return None if self._factor is None else self._factor.ridge

    @property
    def notes(self) -> list[str]:
        """Remarks on the factor for the report."""
        notes = []
        if self._factor is not None:
            if len(self._factor.attempts) > 1:
                used = self._factor.damping
                notes.append(f"not positive definite: damping raised from {self._asked:g} to {used:g}")
            if dead := int(self._factor.dead.sum()):
                notes.append(
                    f"{dead} of {len(self._factor.dead)} inputs are always zero, or too small to square: "
                    "their weights were set to zero"
                )
        return notes


@dataclass(frozen=True)
class LayerProblem:
    """Matrices that share their input, stacked, and what is known of it."""

    weights: Tensor
    """[rows, columns], any float dtype: what the pruned matrices should do the work of. Not to be written."""
    rows: list[int]
    """The row count of each matrix."""
    target: Target
    gram: Gram | None = None
    """H of the input, for methods that need a Hessian."""
    norms: Tensor | None = None
    """[columns] fp32, Σ x², for methods that need no more."""
    judge: Judge | None = None
    """Judges candidates by tokens that are in neither H nor `norms`; None where none are held out."""


@dataclass(frozen=True)
class Solution:
    """The result of a method: the stacked matrices' new `weight` [rows, columns], zero where pruned."""

    weight: Tensor
    damping: float | None = None
    """The damping that was used in the end."""
    iterations: int | None = None
    """Products with H, or what else the method repeats."""
    notes: list[str] = field(default_factory=list)
    ridge: float | None = None
    """The λ that was used, where it is not that of the Gram's factor."""


@dataclass(frozen=True)
class Stacked:
    """Matrices that are solved together, as a plan knows them."""

    weights: int
    """Elements of all of them."""
    columns: int
    largest: int
    """Elements of the largest."""
    sparsity: float
    device: torch.device


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a solver for matrices that share their input."""

    name: str
    """The name of its line in a plan."""
    rule: str
    """The rule in words."""
    flops: Callable[[int, int], float]
    """FLOPs by rows, of all matrices, and columns."""


def zeros_by_matrix(sparsity: float, rows: int, columns: int, block_size: int) -> int:
    """Zeros of a method that chooses in the whole matrix: they are rounded down once."""
    return zeros_of(sparsity, rows * columns)


@dataclass(frozen=True)
class Method:
    """A way to prune. Its file in `methods` is the one place that knows it."""

    name: str
    """The name in recipes, which is that of its file."""
    title: str
    """The name in sentences."""
    needs: Needs
    """The statistic of an input that is gathered for it."""
    solve: Callable[[LayerProblem], Solution]
    workspace: Callable[[Stacked], dict[str, int]]
    """Bytes by purpose that `solve` takes beside the weights it is given. One is SOLVING, for what needs no name."""
    arithmetic: Arithmetic | None = None
    """The arithmetic of `solve`, if it is worth a line in a plan."""
    exact_factor: bool = False
    """Whether it asks for the factor of H in fp64 (`Gram.factor`), not for one to overwrite (`Gram.borrow`)."""
    zeros: Callable[[float, int, int, int], int] = zeros_by_matrix
    """Zeros that it makes of a matrix, by sparsity, rows, columns and block size."""
    does: str = ""
    """A clause for the model card that stands behind the title."""
    knobs: tuple[Literal["damping", "block_size"], ...] = ()
    """The fields of a `Target` that it uses, beside sparsity and pattern."""
    damped_by_error: bool = False
    """Whether its damping is chosen by the error on tokens that are held out, where none is given."""
    reconstruct: Literal["residual", "dense", "layer"] = "layer"
    """The meaning of `reconstruct: auto`, where the order is staged."""
    learns: float | None = None
    """The constant of `expected_gap`, how much it learns by heart, with its own settings; None: not measured."""
    epochs: int = 0
    """The default of `tune` where a pattern keeps little."""
    reorders: bool = False
    """Whether `reorder: auto` means `mlp` where a pattern keeps little."""


def stack(weights: list[Tensor]) -> Tensor:
    """Matrices that share their input as one [rows, columns]."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)
