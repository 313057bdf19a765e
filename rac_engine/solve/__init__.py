"""From a weight matrix and what is known of its input to the pruned matrix.

A method is a file in `methods` with one function (docs/methods.md shows how to add one). The arithmetic is
rac_kernels'.
"""

from __future__ import annotations

from rac_engine.solve.allocation import levelled, owl, settled, zeros_at
from rac_engine.solve.matrices import (
    TOGETHER,
    WHOLE,
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
from rac_engine.solve.methods import admm, alps, magnitude, sparsegpt, wanda  # noqa: F401 - this order registers them

__all__ = [
    "METHODS",
    "TOGETHER",
    "WHOLE",
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
    "levelled",
    "owl",
    "prune_matrices",
    "prune_matrix",
    "prune_table",
    "register",
    "settled",
    "split_rows",
    "zeros_at",
]
