"""A matrix's line of metrics.jsonl."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rac_engine.models import Matrix
from rac_engine.solve import MatrixResult, Target
from rac_kernels import count_zeros


def matrix_row(
    matrix: Matrix,
    result: MatrixResult,
    dense: Tensor,
    target: Target,
    seconds: float = 0.0,
    tokens: int | None = None,
) -> dict[str, Any]:
    """A row for metrics.jsonl: what a matrix was, what was asked of it, and what came of it.

    Args:
        matrix: The matrix.
        result: The pruned matrix, or the reason why it stays dense.
        dense: Its tensor on disk as it was.
        target: What was asked of it; not entered where it stays dense.
        seconds: Time that solving took.
        tokens: Calibration tokens that reached it; None where none are counted.
    """
    row: dict[str, Any] = {
        "type": "matrix",
        "layer": matrix.layer,
        "module": matrix.module,
        "name": matrix.name,
        "rows": matrix.rows,
        "columns": matrix.columns,
        "sparsity": result.zeros / (matrix.rows * matrix.columns),
        "zeros": result.zeros,
        "zeros_before": count_zeros(matrix.of(dense)),
        "objective": result.objective,
        "relative_error": result.relative_error,
        "held_out_error": result.held_out_error,
        "magnitude_error": result.magnitude_error,
        "damping": result.damping,
        "ridge": result.ridge,
        "iterations": result.iterations,
        "tokens": tokens,
        "seconds": seconds,
        "notes": result.notes,
    }
    if result.skipped is None:
        row["target"] = {"sparsity": target.sparsity, "pattern": target.pattern}
    if (rounding := result.rounding) is not None:
        row["values"] = {"kind": rounding.values, "group": rounding.grid.group}
        if rounding.cost is not None and result.power:
            row["values"]["added_error"] = rounding.cost / result.power
        row["lost"] = rounding.lost
    if matrix.group.expert is not None:
        row["expert"] = matrix.group.expert
    if matrix.tensor != matrix.name:
        row |= {"tensor": matrix.tensor, "transposed": matrix.transposed}
    if result.dampings is not None:
        row["dampings"] = {f"{damping:g}": error for damping, error in result.dampings.items()}
    if result.skipped is not None:
        row |= {"skipped": result.skipped, "skipped_code": result.skipped.code}
    return row
