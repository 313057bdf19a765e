"""From a weight matrix and what is known of its input to the pruned matrix.

A method is a file here with one function (docs/methods.md shows how to add one). The arithmetic is rac_kernels'.
"""

from __future__ import annotations

from rac_engine.solve import alps, magnitude, rac, sparsegpt, wanda  # noqa: F401 - in this order they are registered
from rac_engine.solve.matrices import (
    MatrixResult,
    Outputs,
    joined,
    left_dense,
    prune_matrices,
    prune_matrix,
    prune_table,
    split_rows,
)
from rac_engine.solve.method import METHODS, Gram, Method, Problem, Solution, Target, find_method, register

__all__ = [
    "METHODS",
    "Gram",
    "MatrixResult",
    "Method",
    "Outputs",
    "Problem",
    "Solution",
    "Target",
    "find_method",
    "joined",
    "left_dense",
    "prune_matrices",
    "prune_matrix",
    "prune_table",
    "register",
    "split_rows",
]
