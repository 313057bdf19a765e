"""The k-th smallest score of a block of 128 columns, and the mask of those below, against torch's sort and kthvalue.

Not called select.py: a script's folder comes first on Python's path, and the standard library has a select of its own.
`error` is the distance from the k-th of the sorted scores; `wrong`, in how many weights a mask is not a stable sort's.
"""

from __future__ import annotations

import common
import torch
from common import OURS, Bench, Measurement
from torch import Tensor

from rac_kernels import kth_smallest, mask_by_score
from rac_kernels.ops import select


def kth(bench: Bench, rows: int) -> list[Measurement]:
    scores = bench.randn(rows * 128).abs()
    count = scores.numel()
    k = count // 2
    wanted = scores.sort().values[k - 1]
    cases: dict[str, common.Case] = {
        OURS: lambda: kth_smallest(scores, k),
        "torch: sort, as published": lambda: scores.sort().values[k - 1],
        "torch: kthvalue": lambda: scores.kthvalue(k),
    }
    return bench.measure(
        "select",
        f"{rows}x128",
        rows,
        cases,
        limit=select.limit(count),
        extra={OURS: {"error": f"{abs(float(kth_smallest(scores, k) - wanted)):.1e}"}},
    )


def mask(bench: Bench, rows: int, columns: int) -> list[Measurement]:
    """Half of each row, as Wanda prunes; scores of few values, so that there are ties."""
    scores = (bench.randn(rows, columns).abs() * 1000).round()
    k = columns // 2

    def by_sort() -> Tensor:
        first = scores.sort(dim=1, stable=True).indices[:, :k]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, first, True)

    return bench.measure(
        "select",
        f"{rows}x{columns}, rows",
        columns,
        {OURS: lambda: mask_by_score(scores, 0.5), "torch: stable sort": by_sort},
        limit=select.limit(scores.numel()),
        extra={OURS: {"wrong": int((mask_by_score(scores, 0.5) != by_sort()).sum())}},
    )


def run(bench: Bench) -> list[Measurement]:
    found = [found for rows in sorted({rows for rows, _ in bench.shapes}) for found in kth(bench, rows)]
    return found + [found for shape in bench.shapes for found in mask(bench, *shape)]


if __name__ == "__main__":
    common.main(__doc__, {"select": run})
