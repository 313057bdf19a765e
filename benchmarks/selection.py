"""The k-th smallest score of a block of 128 columns, exact, against torch's sort, as published, and its kthvalue.

Not called select.py: a script's folder comes first on Python's path, and the standard library has a select of its own.
"""

from __future__ import annotations

import common
from common import OURS, Bench, Measurement

from rac_kernels import cuda, kth_smallest, roofline
from rac_kernels.select import Selection


def one(bench: Bench, rows: int) -> list[Measurement]:
    scores = bench.randn(rows * 128).abs()
    count = scores.numel()
    k = count // 2
    cases: dict[str, common.Case] = {
        OURS: lambda: kth_smallest(scores, k),
        "torch: sort": lambda: scores.sort().values[k - 1],
        "torch: kthvalue": lambda: scores.kthvalue(k),
    }
    if bench.cuda():
        selection = Selection(1, scores.device, "cuda" if cuda.usable(scores.device) else "triton")
        cases[OURS] = lambda: selection.run(scores, [len(scores)], [k])
    return bench.measure("select", f"{rows}x128", rows, cases, flops=float(count), moved=roofline.select_bytes(count))


def run(bench: Bench) -> list[Measurement]:
    return [found for rows in sorted({rows for rows, _ in bench.shapes}) for found in one(bench, rows)]


if __name__ == "__main__":
    common.main(__doc__, {"select": run})
