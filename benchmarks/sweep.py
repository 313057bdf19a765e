"""The sweep at 50% and 2:4, its factor given, against the published loop and llm-compressor.

`objective` is relative to the published loop's, and `chance` the standard error of that over the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import common
from common import OURS, Bench, Measurement
from torch import Tensor

from rac_kernels import factor_, symmetrize_
from rac_kernels.measure import published
from rac_kernels.ops.objective import row_objectives
from rac_kernels.ops.sweep import limit, sweep

TARGETS = (("50%", 0.5, None), ("2:4", 0.5, (2, 4)))
LOOP = "published loop"


def against(found: Tensor, loop: Tensor) -> dict[str, str]:
    """The objective relative to the published loop's, and the standard error of that over the rows."""
    chance = (found - loop).std() * len(found) ** 0.5 / loop.sum()
    return {"objective": f"{found.sum() / loop.sum():.6f}", "chance": f"{chance:.6f}"}


def one(bench: Bench, rows: int, columns: int) -> list[Measurement]:
    H = bench.gram(columns)
    W = bench.randn(rows, columns) * 0.02
    full = symmetrize_(H.clone())
    R = published.inverse_factor(full)
    U = factor_(H, 0.01).U

    def measure(label: str, sparsity: float, pattern: tuple[int, int] | None) -> list[Measurement]:
        cases: dict[str, Callable[[], Tensor]] = {
            OURS: lambda: sweep(W, U, sparsity, pattern),
            LOOP: lambda: published.sweep(W, R, sparsity, pattern),
        }
        if peer := bench.peer:
            cases[peer.name] = lambda: peer.sweep(W, R, sparsity, pattern)
        results = {name: row_objectives(W, case(), full) for name, case in cases.items()}
        return bench.measure(
            "sweep",
            f"{rows}x{columns}, {label}",
            columns,
            cases,
            limit=limit(rows, columns, W.dtype),
            extra={name: against(result, results[LOOP]) for name, result in results.items()},
        )

    return [found for target in TARGETS for found in measure(*target)]


def run(bench: Bench) -> list[Measurement]:
    return [found for rows, columns in bench.shapes for found in one(bench, rows, columns)]


if __name__ == "__main__":
    common.main(__doc__, {"sweep": run})
