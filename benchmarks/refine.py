"""Masked least squares at 50%: conjugate gradients against ALPS's written plainly, and exact solves of small rows.

`objective` is relative to that of the weights before, the mask of the largest |w| √H_jj in each row. All take as many
iterations, so that times compare; ours checks at the end, besides, that no row became worse.
"""

from __future__ import annotations

from collections.abc import Callable

import common
import torch
from common import OURS, Bench, Measurement
from torch import Tensor

from rac_kernels import mask_by_score, objective
from rac_kernels.measure import published
from rac_kernels.solvers.refine import limit, refine

ITERATIONS = 10  # as many as ALPS takes
SMALL = ((512, 64), (512, 256))


def one(bench: Bench, rows: int, n: int) -> list[Measurement]:
    H = bench.gram(n, full=True)
    H.diagonal().add_(0.01 * H.diagonal().mean())
    W = bench.randn(rows, n) * 0.02
    mask = ~mask_by_score(W.abs() * H.diagonal().sqrt(), 0.5)
    Q = W * mask

    def ours(method: str) -> Tensor:
        return refine(Q, H, W, mask, iterations=ITERATIONS, tolerance=0.0, method=method)[0]

    cases: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: ours("gradients"),
        "published gradients": lambda: published.conjugate_gradients(Q, H, W, mask, ITERATIONS),
    }
    if (rows, n) in SMALL:
        cases["rac_kernels, exact"] = lambda: ours("exact")
        cases["torch: solve row by row"] = lambda: solve_rows(H, W, mask)
    before = objective(W, Q, H)
    return bench.measure(
        "refine",
        f"{rows}x{n}, {ITERATIONS} iterations",
        n,
        cases,
        limit=limit(rows, n, ITERATIONS),
        extra={name: {"objective": f"{objective(W, case(), H) / before:.6f}"} for name, case in cases.items()},
    )


def run(bench: Bench) -> list[Measurement]:
    return [found for rows, n in (*bench.shapes, *SMALL) for found in one(bench, rows, n)]


def solve_rows(H: Tensor, W: Tensor, mask: Tensor) -> Tensor:
    """Each row's optimum by one `torch.linalg.solve` of its own H_SS."""
    Q = torch.zeros_like(W)
    sides = W @ H
    for q, side, kept in zip(Q, sides, mask, strict=True):
        S = kept.nonzero().flatten()
        q[S] = torch.linalg.solve(H[S][:, S], side[S])
    return Q


if __name__ == "__main__":
    common.main(__doc__, {"refine": run})
