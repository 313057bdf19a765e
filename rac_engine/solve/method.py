"""A method's parts: a function that is given a `LayerProblem` and returns a `Solution`, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rac_kernels import Factor, factor_, symmetrize_
from rac_kernels.ops.pattern import zeros_of

Needs = Literal["hessian", "norms", "nothing"]

SOLVING = "fp32 working copies"
"""What plans call the bytes of a solver that need no name of their own."""


@dataclass(frozen=True)
class Target:
    """What is asked of a pruned matrix, and the solvers' knobs."""

    sparsity: float = 0.5
    pattern: str | None = None
    damping: float = 0.01
    block_size: int = 128


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
        """As `factor`, for a method that overwrites U, though not what lies below: for the next one it is made anew.

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
        """What is worth knowing about the factor."""
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
    """Of methods that need a Hessian."""
    norms: Tensor | None = None
    """[columns] fp32, Σ x²: of methods that need no more."""


@dataclass(frozen=True)
class Solution:
    """What a method makes of stacked matrices: their new `weight` [rows, columns], zero where pruned."""

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
    """What a solver computes for matrices that share their input."""

    name: str
    """In plans."""
    rule: str
    """How the FLOPs are counted, in words."""
    flops: Callable[[int, int], float]
    """FLOPs by rows, of all matrices, and columns."""


def zeros_by_matrix(sparsity: float, rows: int, columns: int, block_size: int) -> int:
    """Zeros of a method that chooses in the whole matrix: they are rounded down once."""
    return zeros_of(sparsity, rows * columns)


@dataclass(frozen=True)
class Method:
    """A way to prune. Its file in `methods` is the one place that knows it."""

    name: str
    """In recipes: the name of its file."""
    title: str
    """In sentences."""
    needs: Needs
    """What is gathered from an input for it."""
    solve: Callable[[LayerProblem], Solution]
    workspace: Callable[[Stacked], dict[str, int]]
    """Bytes by purpose that `solve` takes beside the weights it is given. One is SOLVING, for what needs no name."""
    arithmetic: Arithmetic | None = None
    """What `solve` computes, if it is worth a line in a plan."""
    exact_factor: bool = False
    """Whether it asks for the factor of H in fp64 (`Gram.factor`), not for one to overwrite (`Gram.borrow`)."""
    zeros: Callable[[float, int, int, int], int] = zeros_by_matrix
    """How many zeros it makes of a matrix, by sparsity, rows, columns and block size."""
    does: str = ""
    """A clause for the model card that stands behind the title."""
    knobs: tuple[Literal["damping", "block_size"], ...] = ()
    """The fields of a `Target` that it uses, beside sparsity and pattern."""
    reconstruct: Literal["residual", "dense", "layer"] = "layer"
    """What `reconstruct: auto` means for it, where the order is staged."""
    epochs: int = 0
    """What `tune` is by default where a pattern keeps little."""
    reorders: bool = False
    """Whether `reorder: auto` means `mlp` where a pattern keeps little."""


def stack(weights: list[Tensor]) -> Tensor:
    """Matrices that share their input as one [rows, columns]."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)
