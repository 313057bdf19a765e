"""H + λI = U Uᵀ in place, against the published chain of three factorizations and torch's one Cholesky."""

from __future__ import annotations

import common
import published
import torch
from common import OURS, Bench, Measurement

from rac_kernels import factor_, roofline, symmetrize_


def one(bench: Bench, n: int) -> list[Measurement]:
    H = bench.gram(n)
    full = symmetrize_(H.clone())
    full.diagonal().add_(0.01 * full.diagonal().mean())
    work = torch.empty_like(H)
    # llm-compressor's factor is the published chain, inside its sparsify_weight.
    cases: dict[str, common.Case] = {
        OURS: lambda: factor_(work, 0.01),
        "torch: cholesky, inverse, cholesky": lambda: published.inverse_factor(full, 0.0),
        "torch: one cholesky": lambda: torch.linalg.cholesky_ex(full),
    }
    return bench.measure(
        "factor",
        f"n={n}",
        n,
        cases,
        flops=roofline.factor_flops(n),
        moved=roofline.factor_bytes(n),
        setup=lambda: work.copy_(H),
    )


def run(bench: Bench) -> list[Measurement]:
    return [found for n in bench.columns for found in one(bench, n)]


if __name__ == "__main__":
    common.main(__doc__, {"factor": run})
