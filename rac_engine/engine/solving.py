"""Matrices that share an input are solved together, and the result is entered in their layer."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, replace

from torch import Tensor

from rac_engine.calibrate import DenseInputs, DenseOutputs, Statistic
from rac_engine.engine.layer import Layer
from rac_engine.models import Matrix
from rac_engine.solve import HeldOut, MatrixResult, Outputs, Reason, joined, left_dense, prune_matrices, split_rows
from rac_kernels import FactorError


@dataclass(frozen=True)
class ExpertTokens:
    """Tokens that the router sent to an expert."""

    count: int
    scarce: Reason | None
    """A text for the report where they are too few to prune the expert by them alone."""


def solve_group(
    layer: Layer,
    group: list[Matrix],
    statistic: Statistic | None,
    expert: ExpertTokens | None = None,
    install: bool = True,
) -> None:
    """Prune matrices that share an input, and enter results and rows in the layer.

    Args:
        layer: The layer that the matrices belong to.
        group: The matrices.
        statistic: What was gathered from their input; it is used up. None for methods that need nothing.
        expert: Tokens that reached the matrices, if they are an expert's.
        install: Whether later passes over the tokens are to go through the pruned matrices.
    """
    context = layer.context
    context.make_room(group[0])
    began = time.monotonic()
    weights = [matrix.of(layer.tensors[matrix.tensor]).to(context.device).contiguous() for matrix in group]
    with context.clock("solve"):
        try:
            results = _results(layer, group, weights, statistic, None if expert is None else expert.scarce)
        except FactorError as error:
            raise FactorError(f"{group[0].path}: {error}") from None
    seconds = time.monotonic() - began
    remarks = [] if statistic is None else _remarks(statistic, group[0].columns)
    for matrix, result in zip(group, results, strict=True):
        notes = [*remarks, *result.notes]
        if expert is not None and expert.scarce is not None and result.skipped is None:
            by_magnitude = context.settings.experts.otherwise == "magnitude"
            how = "pruned by magnitude" if by_magnitude else "H blended with that of all tokens"
            notes = [f"{expert.scarce}: {how}", *notes]
        share = matrix.rows / sum(other.rows for other in group)
        tokens = None if expert is None else expert.count
        layer.note(matrix, replace(result, notes=notes), seconds * share, tokens)
        if result.skipped is None:
            layer.replace(matrix, result.weight)
            if result.rounding is not None:
                layer.grids[matrix.name] = result.rounding.grid
    if install:
        layer.install([group])


def _results(
    layer: Layer, group: list[Matrix], weights: list[Tensor], statistic: Statistic | None, scarce: Reason | None
) -> list[MatrixResult]:
    """A result for each matrix of a group, whose dense `weights` [rows, columns] are on the device."""
    settings, otherwise = layer.context.settings, layer.context.settings.experts.otherwise
    if scarce is not None and otherwise == "dense":
        return [left_dense(weight, scarce) for weight in weights]
    method, known, match = settings.method, None, None
    if statistic is not None:
        known, match = statistic.value, statistic.match
    if scarce is not None and otherwise == "magnitude":
        method, known = "magnitude", None
    parts = [[weight] for weight in weights]
    if known is not None and not isinstance(match, DenseOutputs):
        parts = [split_rows(weight) for weight in weights]
    pieces = list(itertools.chain(*parts))
    outputs = _outputs(match, pieces)
    held = None
    if known is not None and statistic is not None and (other := statistic.held) is not None:
        held = HeldOut(other.value, _outputs(other.match, pieces), other.tokens)
    targets = [layer.context.target(matrix) for matrix, some in zip(group, parts, strict=True) for _ in some]
    unseen = "magnitude" if group[0].module in layer.reordered else settings.unseen
    found = iter(prune_matrices(pieces, known, method, targets, unseen, outputs, held))
    return [joined(list(itertools.islice(found, len(some)))) for some in parts]


def _outputs(match: DenseInputs | DenseOutputs | None, weights: list[Tensor]) -> Outputs | None:
    """The outputs to match with dense `weights` [rows, columns], from what was gathered of them."""
    if isinstance(match, DenseInputs):
        return Outputs.of_inputs(match.cross, match.gram, weights)
    return None if match is None else Outputs(match.cross, [match.wanted], [match.dense], by_row=match.by_row)


def _remarks(statistic: Statistic, columns: int) -> list[str]:
    """Notes for the report on an input of `columns` features."""
    remarks = []
    if statistic.dropped:
        remarks.append(f"{statistic.dropped:,} tokens hold NaN or Inf and were left out")
    if 0 < statistic.tokens < columns and statistic.value.ndim == 2:
        remarks.append(f"{statistic.tokens:,} tokens for {columns:,} inputs: damping alone makes H definite")
    return remarks
