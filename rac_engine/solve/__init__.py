"""Pruning of weight matrices, each by what is known of its input.

A method is a file in `methods` (docs/methods.md shows how to add one). The arithmetic is rac_kernels'. Names of methods
are known without torch; all else is imported when it is asked for, so that `rac prune --help` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rac_engine.solve.methods import DEFAULT_METHOD, find_method, method_names, why_unknown

if TYPE_CHECKING:
    from rac_engine.solve.allocation import levelled, settled, zeros_at
    from rac_engine.solve.costs import GroupShape, solving_bytes
    from rac_engine.solve.damping import CHOOSING, choosing_flops
    from rac_engine.solve.generalisation import MOST, enough_tokens, expected_gap
    from rac_engine.solve.matrices import (
        MatrixResult,
        joined,
        left_dense,
        prune_matrices,
        prune_matrix,
        prune_table,
        run_of_rows,
        split_rows,
    )
    from rac_engine.solve.method import DAMPING, Gram, LayerProblem, Method, Needs, Solution, Target
    from rac_engine.solve.outputs import HeldOut, Outputs
    from rac_engine.solve.reasons import Reason, ReasonCode

__all__ = [
    "CHOOSING",
    "DAMPING",
    "DEFAULT_METHOD",
    "MOST",
    "Gram",
    "GroupShape",
    "HeldOut",
    "LayerProblem",
    "MatrixResult",
    "Method",
    "Needs",
    "Outputs",
    "Reason",
    "ReasonCode",
    "Solution",
    "Target",
    "choosing_flops",
    "enough_tokens",
    "expected_gap",
    "find_method",
    "joined",
    "left_dense",
    "levelled",
    "method_names",
    "prune_matrices",
    "prune_matrix",
    "prune_table",
    "run_of_rows",
    "settled",
    "solving_bytes",
    "split_rows",
    "why_unknown",
    "zeros_at",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A name of `__all__`, from the module that has it."""
        if name in __all__:
            for module in (
                "method",
                "matrices",
                "costs",
                "damping",
                "allocation",
                "outputs",
                "reasons",
                "generalisation",
            ):
                found = vars(importlib.import_module(f"{__name__}.{module}"))
                if name in found:
                    return globals().setdefault(name, found[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
