"""C += XᵀY of two bf16 streams into fp32, against torch's product of fp32 copies and its bf16 product."""

from __future__ import annotations

import common
import torch
from common import OURS, Bench, Measurement
from torch import Tensor

from rac_kernels import cross_accumulate_
from rac_kernels.ops import cross


def one(bench: Bench, n: int, m: int) -> list[Measurement]:
    X = bench.activations(n)
    Y = bench.activations(m)
    C = torch.zeros(n, m, device=bench.device)
    strip = slice(0, min(n, 256))  # of rows: the errors are taken there
    exact = X[:, strip].double().T @ Y.double()
    scale = exact.abs().max().item()

    def error(C: Tensor) -> dict[str, str]:
        return {"error": f"{(C[strip].double() - exact).abs().max().item() / scale:.1e}"}

    plain, half = "torch, fp32", "torch, bf16, rounded each call"
    extra = {
        OURS: error(cross_accumulate_(C.clone(), X, Y)),
        plain: error(X.float().T @ Y.float()),
        half: error(X.T @ Y),
    }
    cases: dict[str, common.Case] = {
        OURS: lambda: cross_accumulate_(C, X, Y),
        plain: lambda: C.addmm_(X.float().T, Y.float()),
        half: lambda: C.add_(X.T @ Y),
    }
    return bench.measure(
        "cross",
        f"{bench.tokens} tokens, {n}x{m}",
        n,
        cases,
        limit=cross.limit(bench.tokens, n, m),
        extra=extra,
    )


def run(bench: Bench) -> list[Measurement]:
    # A matrix of m rows has m outputs, and n inputs.
    return [found for m, n in bench.shapes for found in one(bench, n, m)]


if __name__ == "__main__":
    common.main(__doc__, {"cross": run})
