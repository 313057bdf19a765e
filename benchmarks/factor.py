"""H + λI = U Uᵀ in place, against the published chain of three factorizations and torch's one Cholesky.

On a GPU also the three matrices of a small layer in one batched call. `error` is the largest of |U Uᵀ − H − λI| by
√(H_ii H_jj).
"""

from __future__ import annotations

import common
import torch
from common import OURS, Bench, Measurement
from torch import Tensor

from rac_kernels import factor_, factor_batch_, symmetrize_
from rac_kernels.measure import published
from rac_kernels.ops import factor

BATCH = 3  # as many inputs of a layer have the model's width


def one(bench: Bench, n: int) -> list[Measurement]:
    H = bench.gram(n)
    full = symmetrize_(H.clone())
    full.diagonal().add_(0.01 * full.diagonal().mean())
    work = torch.empty_like(H)
    some = torch.arange(0, n, max(n // 256, 1), device=bench.device)  # rows, where the errors are taken
    scale = full.diagonal().double().sqrt()

    def error(triangle: Tensor) -> dict[str, str]:
        wrong = triangle[some].double() @ triangle.double().T - full[some].double()
        return {"error": f"{(wrong.abs_() / scale / scale[some, None]).max().item():.1e}"}

    # llm-compressor's factor is the published chain, inside its sparsify_weight.
    once = "torch: one cholesky"
    cases: dict[str, common.Case] = {
        OURS: lambda: factor_(work, 0.01),
        "torch: cholesky, inverse, cholesky": lambda: published.inverse_factor(full, 0.0),
        once: lambda: torch.linalg.cholesky_ex(full),
    }
    extra = {OURS: error(factor_(work.copy_(H), 0.01).U.triu()), once: error(torch.linalg.cholesky_ex(full)[0])}
    return bench.measure(
        "factor",
        f"n={n}",
        n,
        cases,
        limit=factor.limit(n),
        setup=lambda: work.copy_(H),
        extra=extra,
    )


def several(bench: Bench, n: int) -> list[Measurement]:
    H = bench.gram(n)
    work = H.expand(BATCH, n, n).clone()
    full = symmetrize_(H.clone())
    full.diagonal().add_(0.01 * full.diagonal().mean())
    batch = full.expand(BATCH, n, n).clone()
    return bench.measure(
        "factor",
        f"{BATCH} of n={n}",
        n,
        {
            OURS: lambda: factor_batch_(work, 0.01),
            f"{OURS}, one by one": lambda: [factor_(one, 0.01) for one in work],
            "torch: one cholesky of all": lambda: torch.linalg.cholesky_ex(batch),
        },
        limit=factor.limit(n, BATCH),
        setup=lambda: work.copy_(H),
    )


def run(bench: Bench) -> list[Measurement]:
    found = [found for n in bench.columns for found in one(bench, n)]
    return found + (several(bench, min(bench.columns)) if bench.cuda() else [])


if __name__ == "__main__":
    common.main(__doc__, {"factor": run})
