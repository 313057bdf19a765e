"""Pruning matrices that share their input: the method's part, and what is the same for all methods around it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rac_engine.solve.damping import Trial, choose_damping
from rac_engine.solve.method import Gram, LayerProblem, Solution, Target, stack
from rac_engine.solve.methods import find_method
from rac_engine.solve.outputs import FEWEST_TOKENS, HeldOut, Judge, Outputs
from rac_engine.solve.reasons import Reason, ReasonCode
from rac_engine.solve.rounding import Rounding, round_matrices
from rac_kernels import (
    all_finite,
    count_zeros,
    mask_by_score,
    matched_target,
    objective,
    reconstruction_error,
    reported_objectives,
    squared_outputs,
    squared_outputs_of,
)

DIGITS = 1e-5  # in which two errors that are found in different ways may differ

TOGETHER = 1 << 26  # weights solved together at most, where there is more than one matrix

WHOLE = 1 << 28  # weights of a matrix beyond which it is solved by runs of rows, with thresholds of their own


@dataclass(frozen=True)
class MatrixResult:
    """A pruned matrix, in the dtype it came in, and what pruning it cost.

    `objective` is the squared error of the outputs that were to be reconstructed, with Q the `weight` as it is stored:
    ‖X Qᵀ − X Wᵀ‖² = tr((W − Q) H (W − Q)ᵀ), or ‖X′ Qᵀ − Y‖² where the dense model's outputs Y were matched.
    `relative_error` is its share of ‖X Wᵀ‖², the dense outputs' own square, `magnitude_error` what that would be if the
    matrix were pruned by magnitude to the same target (a note says so where that is less). All three are None where no
    Hessian was gathered. `damping` is the one that was used in the end and `ridge` the λ that it means for this input;
    `held_out_error` is the relative error on tokens that were held out, None where there are none; `iterations` counts
    what the method repeats; `seconds` is this matrix's share of the time taken. `skipped` says why
    a matrix was left as it was.
    """

    weight: Tensor
    objective: float | None
    zeros: int
    damping: float | None
    notes: list[str]
    relative_error: float | None = None
    skipped: Reason | None = None
    ridge: float | None = None
    iterations: int | None = None
    seconds: float = 0.0
    magnitude_error: float | None = None
    power: float | None = None
    """‖X Wᵀ‖², where the errors are known."""
    held_out_error: float | None = None
    held_out_power: float | None = None
    """‖X Wᵀ‖² of the tokens that were held out."""
    dampings: dict[float, float] | None = None
    """What was tried to choose the damping: by each the error held out of some rows; None where it was given."""
    rounding: Rounding | None = None
    """How the kept weights were put on a grid, where the target asks for that."""


def prune_matrix(
    W: Tensor,
    H: Tensor,
    method: str = "sparsegpt",
    sparsity: float = 0.5,
    pattern: str | None = None,
    damping: float = 0.01,
    block_size: int = 128,
    values: str = "same",
) -> MatrixResult:
    """Prune one matrix W [rows, columns], with H = XᵀX [columns, columns], full or upper triangle. Neither is modified.

    `pattern` is text like "2:4" (2 of every 4 columns stay; `sparsity` is not used) or None for unstructured pruning.
    `values` says what kept weights are: numbers of W's dtype ("same"), or of those scale · code with codes of "int8" or
    "int4" and a scale in bf16 for the columns of a block, about 32 kept weights.
    Raises `BadInput` for an unknown method, `ValueError` for settings that do not fit the matrix, and
    `rac_kernels.FactorError` for an H that no damping allowed makes positive definite.
    """
    needs = find_method(method).needs
    statistic = None
    if needs != "nothing":
        statistic = (H if needs == "hessian" else H.diagonal()).to(torch.float32, copy=True).contiguous()
    (result,) = prune_matrices([W], statistic, method, Target(sparsity, pattern, damping, block_size, values=values))
    if result.objective is None:
        cost, whole = objective(W, result.weight, H), squared_outputs(W, H)
        result = replace(result, objective=cost, relative_error=cost / whole if whole else 0.0)
    return result


def prune_matrices(
    weights: Sequence[Tensor],
    statistic: Tensor | None,
    method: str,
    target: Target | Sequence[Target],
    unseen: Literal["dense", "magnitude"] = "dense",
    outputs: Outputs | None = None,
    held: HeldOut | None = None,
) -> list[MatrixResult]:
    """Prune matrices that share their input together, all to one target or each to its own.

    `weights` are [rows, columns] and stay as they are. `statistic` is what the method needs to know of the input, H
    [columns, columns] fp32 (upper triangle), its diagonal, or None, and is used up. With `outputs`, of methods that
    need H, what is pruned is not W but the weights that come nearest to those outputs. An input that was zero for every
    token says nothing, nor does one whose squares are beyond fp32: the matrices are then left dense, or pruned by
    magnitude. So is a matrix for which the method's result is not finite. The method is shown the tokens that are
    `held` out of all that, to judge by, and the results are measured by them.
    """
    notes = []
    if statistic is not None and (why := _says_nothing(statistic)):
        if unseen == "dense":
            return [left_dense(weight, why) for weight in weights]
        method, statistic, outputs = "magnitude", None, None
        notes = [f"{why}: pruned by magnitude"]
    if outputs is not None and not outputs.finite:
        outputs = None
        notes = ["the dense model's outputs are not finite: not matched"]
    if held is not None and (outputs is None) != (held.outputs is None):
        held = replace(held, outputs=None)
    if held is not None and not held.says_something:
        held = None
    targets = [target] * len(weights) if isinstance(target, Target) else list(target)
    gram = Gram(statistic) if statistic is not None and statistic.ndim == 2 else None
    norms = statistic if gram is None else None
    solver = find_method(method)
    found: dict[int, MatrixResult] = {}
    for wanted, group in _batches(weights, targets):
        began = time.monotonic()
        parts = [weights[number] for number in group]
        rows, dampings, unchosen = [len(part) for part in parts], None, list[str]()
        choosing = solver.damped_by_error and wanted.chooses and wanted.prunes
        if choosing and gram is not None and held is not None:
            if held.tells:
                chosen, dampings = choose_damping(Trial(parts, gram, outputs, held), solver, wanted)
                wanted = replace(wanted, damping=chosen)
            else:
                unchosen = [f"damping {wanted.damping:g}: fewer than {FEWEST_TOKENS} tokens held out to choose it by"]
        stacked = stack(parts)
        if outputs is not None and gram is not None:
            stacked = matched_target(gram.factor(wanted.damping), outputs.of(stacked), stacked)
        judge = None if held is None else Judge(held, parts, group)
        solution = _solution(LayerProblem(stacked, rows, wanted, gram, norms, judge), solver.solve)
        ridge = solution.ridge if gram is None or solution.ridge is not None else gram.ridge
        remarks = [*notes, *unchosen, *(gram.notes if gram else []), *solution.notes]
        made, roundings = solution.weight, list[Rounding | None]([None] * len(group))
        if wanted.values != "same" and all_finite(made):
            dtype = parts[0].dtype
            made, roundings[:] = round_matrices(made, stacked, rows, wanted, gram, norms, dtype)
        seconds = time.monotonic() - began
        for number, pruned, rounding in zip(group, made.split(rows), roundings, strict=True):
            # Rounding to the stored dtype can leave −0.0; adding 0 makes it +0.0.
            stored = pruned.to(weights[number].dtype, copy=True).add_(0.0)
            its = remarks
            if not all_finite(stored):
                stored = _by_magnitude(weights[number], wanted)
                its = [*remarks, "the solver's result is not finite: pruned by magnitude"]
                if wanted.values != "same":
                    plain, (rounding,) = round_matrices(stored, stored, [len(stored)], wanted, None, None, stored.dtype)
                    stored = plain.to(stored.dtype)
            zeros = count_zeros(stored)
            found[number] = MatrixResult(
                stored,
                None,
                zeros,
                solution.damping,
                its,
                ridge=ridge,
                iterations=solution.iterations,
                seconds=seconds * len(stored) / sum(rows),
                dampings=dampings,
                rounding=rounding,
            )
        del stacked, solution, made, pruned  # before the next ones are solved
    results = [found[number] for number in range(len(weights))]
    if gram is None:
        return results
    H = gram.upper()
    problems = enumerate(zip(results, weights, targets, strict=True))
    return [
        _measured(result, weight, wanted, H, outputs, held, number) for number, (result, weight, wanted) in problems
    ]


def _solution(problem: LayerProblem, solve: Callable[[LayerProblem], Solution]) -> Solution:
    """What the method makes of the matrices: where nothing is to go, what it was given."""
    target, gram = problem.target, problem.gram
    if target.values == "same" or target.prunes:
        return solve(problem)
    if gram is None:
        return Solution(problem.weights.float())
    factor = gram.borrow(target.damping)
    return Solution(problem.weights.float().masked_fill(factor.dead, 0), factor.damping)


def _measured(
    result: MatrixResult,
    weight: Tensor,
    target: Target,
    H: Tensor,
    outputs: Outputs | None,
    held: HeldOut | None,
    number: int,
) -> MatrixResult:
    """The result with its errors under H (upper triangle) beside those of magnitude pruning, and of tokens `held` out.

    `number` is the matrix's place among those whose `outputs` are known.
    """
    candidate = _by_magnitude(weight, target)
    judged: tuple[float, float] | None = None
    if outputs is None:
        grams = [H] if held is None else [H, held.gram]
        wholes, costs = squared_outputs_of(weight, grams), reported_objectives(weight, result.weight, grams)
        whole, cost = wholes[0], costs[0]
        judged = None if held is None else (costs[1], wholes[1])
        # Of the weights that went, to fewer digits: where both are the same, so are their errors.
        by_magnitude = cost if torch.equal(result.weight, candidate) else squared_outputs(weight - candidate, H)
    else:
        cross, whole = outputs.of(weight), outputs.dense[number]
        cost = reconstruction_error(result.weight, H, cross, outputs.power[number])
        by_magnitude = reconstruction_error(candidate, H, cross, outputs.power[number])
        judged = None if held is None else held.error(weight, result.weight, number)
    if judged is not None:
        cost_held, whole_held = judged
        share_held = cost_held / whole_held if whole_held else 0.0
        result = replace(result, held_out_error=share_held, held_out_power=whole_held)
    share, simple = (each / whole if whole else 0.0 for each in (cost, by_magnitude))
    notes = result.notes
    if share > simple * (1 + DIGITS):
        notes = [*notes, f"worse than magnitude pruning: relative error {share:.3g}, by magnitude {simple:.3g}"]
    return replace(result, objective=cost, relative_error=share, magnitude_error=simple, power=whole, notes=notes)


def run_of_rows(rows: int, columns: int) -> int:
    """Rows of a matrix that are solved together: all, but for tables of a large vocabulary."""
    return rows if rows * columns <= WHOLE else max(TOGETHER // columns, 1)


def split_rows(weight: Tensor) -> list[Tensor]:
    """A matrix as the runs of rows that it is solved by."""
    run = run_of_rows(*weight.shape)
    return [weight] if run == len(weight) else list(weight.split(run))


def together(weights: int, largest: int) -> int:
    """Weights, of so many, that are solved together; `largest` are those of the largest matrix."""
    return min(weights, max(largest, TOGETHER))


def joined(results: Sequence[MatrixResult]) -> MatrixResult:
    """The result for a matrix from those for its runs of rows, in their order."""
    first = results[0]
    if len(results) == 1:
        return first
    made = replace(
        first,
        weight=torch.cat([result.weight for result in results]),
        zeros=sum(result.zeros for result in results),
        notes=list(dict.fromkeys(note for result in results for note in result.notes)),
        seconds=sum(result.seconds for result in results),
        rounding=Rounding.joined([result.rounding for result in results]),
    )
    judged = [(r.held_out_error, r.held_out_power) for r in results]
    if (whole := sum(power or 0.0 for _, power in judged)) > 0:
        error = sum((error or 0.0) * (power or 0.0) for error, power in judged) / whole
        made = replace(made, held_out_error=error, held_out_power=whole)
    known = [(r.objective, r.magnitude_error, r.power) for r in results if r.power is not None]
    if len(known) < len(results):
        return made
    cost, power = sum(c or 0.0 for c, _, _ in known), sum(p for *_, p in known)
    simple = sum((m or 0.0) * p for _, m, p in known)
    shares = (cost / power, simple / power) if power else (0.0, 0.0)
    return replace(made, objective=cost, relative_error=shares[0], magnitude_error=shares[1], power=power)


def prune_table(table: Tensor, target: Target) -> MatrixResult:
    """Prune embeddings [tokens, hidden] by magnitude within each token's row.

    Their input is the token's number, one 1 among zeros: H is diagonal, nothing can make up for a weight that goes, and
    the best that a row can keep are its largest. Counts of tokens would only say which words may be forgotten.
    """
    made, step = torch.empty_like(table), max(TOGETHER // table.shape[1], 1)
    for first in range(0, len(table), step):
        some = slice(first, first + step)
        mask = mask_by_score(table[some].float().abs(), target.sparsity, target.pattern, per="row")
        made[some] = table[some].masked_fill(mask, 0).add_(0.0)  # +0.0, never −0.0
    zeros = count_zeros(made)
    return MatrixResult(made, None, zeros, None, ["by magnitude within each token's row: their input is a number"])


def _batches(weights: Sequence[Tensor], targets: Sequence[Target]) -> Iterator[tuple[Target, list[int]]]:
    """Matrices that are solved together, by their numbers: with one target, and no more than TOGETHER weights."""
    for wanted in dict.fromkeys(targets):
        batch, size = list[int](), 0
        for number in (number for number, its in enumerate(targets) if its == wanted):
            if batch and size + weights[number].numel() > TOGETHER:
                yield wanted, batch
                batch, size = [], 0
            batch.append(number)
            size += weights[number].numel()
        yield wanted, batch


def _says_nothing(statistic: Tensor) -> Reason | None:
    """Why nothing can be learnt from H or its diagonal; None if something can."""
    diagonal = statistic.diagonal() if statistic.ndim == 2 else statistic
    if not bool(diagonal.isfinite().all()):
        return Reason(ReasonCode.BEYOND_FP32, "its inputs are beyond fp32 when squared")
    # Sums of products of finite numbers whose squares are finite are finite too: |Σ xy| ≤ √(Σ x² · Σ y²).
    return None if diagonal.any() else Reason(ReasonCode.NO_TOKEN, "no calibration token reached it")


def _by_magnitude(weight: Tensor, target: Target) -> Tensor:
    """One matrix, pruned by magnitude."""
    return find_method("magnitude").solve(LayerProblem(weight, [len(weight)], target)).weight.add(0.0)


def left_dense(weight: Tensor, why: Reason) -> MatrixResult:
    """The result for a matrix that stays as it is."""
    return MatrixResult(weight, None, count_zeros(weight), None, [], skipped=why)
