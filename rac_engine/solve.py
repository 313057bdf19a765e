"""From a weight matrix and what is known of its input to the pruned matrix.

A method is one function, registered in `METHODS` with what it needs to know. The arithmetic is rac_kernels'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from rac_engine.errors import BadInput
from rac_kernels import factor_, mask_by_score, objective, sweep


@dataclass(frozen=True)
class Target:
    """What is asked of a pruned matrix, and the solvers' knobs."""

    sparsity: float = 0.5
    pattern: str | None = None
    damping: float = 0.01
    block_size: int = 128


@dataclass(frozen=True)
class Solution:
    """What a method makes of stacked matrices: their new `weight` [rows, columns], zero where pruned.

    `hessian` is H again (upper triangle), if the method had it, to measure the result with.
    """

    weight: Tensor
    hessian: Tensor | None = None
    damping: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Method:
    """A way to prune.

    `solve` is given the weights [rows, columns] of matrices that share their input, stacked, and not to be written;
    what it `needs` of that input, to be used up: H [columns, columns] fp32 (upper triangle), its diagonal, or None;
    the row count of each matrix; and the target.
    """

    needs: Literal["hessian", "norms", "nothing"]
    solve: Callable[[Tensor, Tensor | None, list[int], Target], Solution]


@dataclass(frozen=True)
class MatrixResult:
    """A pruned matrix, in the dtype it came in, and what pruning it cost.

    `objective` is tr((W − Q) H (W − Q)ᵀ) with Q the `weight` as it is stored, `relative_error` its share of tr(W H Wᵀ);
    both are None where no Hessian was gathered. `damping` is the one that was used in the end. `skipped` says why a
    matrix was left as it was.
    """

    weight: Tensor
    objective: float | None
    zeros: int
    damping: float | None
    notes: list[str]
    relative_error: float | None = None
    skipped: str | None = None


def sparsegpt(weights: Tensor, hessian: Tensor | None, rows: list[int], target: Target) -> Solution:
    """SparseGPT (Frantar, Alistarh, arXiv 2301.00774), unstructured with a threshold for each block of columns."""
    assert hessian is not None
    factor = factor_(hessian, target.damping)
    pruned = sweep(weights, factor.U, target.sparsity, target.pattern, target.block_size, factor.dead, rows)
    notes = []
    if len(factor.attempts) > 1:
        notes.append(f"not positive definite: damping raised from {target.damping:g} to {factor.damping:g}")
    if dead := int(factor.dead.sum()):
        notes.append(f"{dead} of {len(factor.dead)} inputs are always zero: their weights were set to zero")
    restored = factor.U.T  # below U lies H's upper triangle
    restored.diagonal().copy_(factor.diagonal)
    return Solution(pruned, restored, factor.damping, notes)


def wanda(weights: Tensor, norms: Tensor | None, rows: list[int], target: Target) -> Solution:
    """Wanda (Sun, Liu, Bair, Kolter, arXiv 2306.11695): |W|·‖x‖₂, compared within each output row."""
    assert norms is not None
    scores = weights.float().abs() * norms.sqrt()
    mask = mask_by_score(scores, target.sparsity, target.pattern, per="row")
    return Solution(weights.masked_fill(mask, 0))


def magnitude(weights: Tensor, nothing: Tensor | None, rows: list[int], target: Target) -> Solution:
    """The smallest weights of each matrix go."""
    masks = [
        mask_by_score(weight.float().abs(), target.sparsity, target.pattern, per="matrix")
        for weight in weights.split(rows)
    ]
    return Solution(weights.masked_fill(torch.cat(masks), 0))


METHODS = {
    "sparsegpt": Method("hessian", sparsegpt),
    "wanda": Method("norms", wanda),
    "magnitude": Method("nothing", magnitude),
}


def find_method(name: str) -> Method:
    """The method of that name; `BadInput` if there is none."""
    if name not in METHODS:
        raise BadInput(f"method {name!r} is not known; known are {', '.join(METHODS)}")
    return METHODS[name]


def prune_matrix(
    W: Tensor,
    H: Tensor,
    method: str = "sparsegpt",
    sparsity: float = 0.5,
    pattern: str | None = None,
    damping: float = 0.01,
    block_size: int = 128,
) -> MatrixResult:
    """Prune one matrix W [rows, columns], with H = XᵀX [columns, columns], full or upper triangle. Neither is modified.

    `pattern` is text like "2:4" (2 of every 4 columns stay; `sparsity` is not used) or None for unstructured pruning.
    Raises `BadInput` for an unknown method, `ValueError` for settings that do not fit the matrix, and
    `rac_kernels.FactorError` for an H that no damping allowed makes positive definite.
    """
    needs = find_method(method).needs
    statistic = None
    if needs != "nothing":
        statistic = (H if needs == "hessian" else H.diagonal()).to(torch.float32, copy=True).contiguous()
    (result,) = prune_matrices([W], statistic, method, Target(sparsity, pattern, damping, block_size))
    if result.objective is None:
        cost, share = _measure(W, result.weight, H)
        result = replace(result, objective=cost, relative_error=share)
    return result


def prune_matrices(
    weights: Sequence[Tensor],
    statistic: Tensor | None,
    method: str,
    target: Target,
    unseen: Literal["dense", "magnitude"] = "dense",
) -> list[MatrixResult]:
    """Prune matrices that share their input together, each to the target by itself.

    `weights` are [rows, columns] and stay as they are, `statistic` is what the method needs (see `Method`) and is used
    up. An input that was zero for every token says nothing: the matrices are then left dense, or pruned by magnitude.
    """
    notes = []
    if statistic is not None and not (statistic.diagonal() if statistic.ndim == 2 else statistic).any():
        if unseen == "dense":
            return [left_dense(weight, "no calibration token reached it") for weight in weights]
        method, statistic = "magnitude", None
        notes = ["no calibration token reached it: pruned by magnitude"]
    rows = [len(weight) for weight in weights]
    stacked = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    solution = find_method(method).solve(stacked, statistic, rows, target)
    results = []
    for weight, pruned in zip(weights, solution.weight.split(rows), strict=True):
        # Rounding to the stored dtype can leave −0.0; adding 0 makes it +0.0.
        stored = pruned.to(weight.dtype, copy=True).add_(0.0)
        cost, share = (None, None) if solution.hessian is None else _measure(weight, stored, solution.hessian)
        zeros = stored.numel() - int(stored.count_nonzero())
        results.append(MatrixResult(stored, cost, zeros, solution.damping, [*notes, *solution.notes], share))
    return results


def left_dense(weight: Tensor, why: str) -> MatrixResult:
    """The result for a matrix that stays as it is."""
    return MatrixResult(weight, None, weight.numel() - int(weight.count_nonzero()), None, [], skipped=why)


def _measure(weight: Tensor, pruned: Tensor, hessian: Tensor) -> tuple[float, float]:
    """The objective, and its share of what pruning everything would cost."""
    cost = objective(weight, pruned, hessian)
    whole = objective(weight, torch.zeros_like(weight[:1]).expand_as(weight), hessian)
    return cost, cost / whole if whole else 0.0
