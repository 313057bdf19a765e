"""H += XᵀX: the triangle from bf16 tokens, against torch's full product in fp32 and llm-compressor."""

from __future__ import annotations

import common
import torch
from common import OURS, Bench, Measurement
from torch import Tensor

from rac_kernels import hessian_accumulate_
from rac_kernels.measure import published
from rac_kernels.ops import hessian


def one(bench: Bench, n: int) -> list[Measurement]:
    X = bench.activations(n)
    H = torch.zeros(n, n, device=bench.device)
    strip = slice(0, min(n, 256))  # of rows: the errors are taken there
    exact = (X[:, strip].double().T @ X.double()).triu()
    scale = exact.abs().max().item()

    def error(full: Tensor) -> dict[str, str]:
        return {"error": f"{(full[strip].double().triu() - exact).abs().max().item() / scale:.1e}"}

    plain = "torch, fp32, full"
    extra = {OURS: error(hessian_accumulate_(H.clone(), X)), plain: error(published.hessian_(H.clone(), X))}
    cases: dict[str, common.Case] = {
        OURS: lambda: hessian_accumulate_(H, X),
        plain: lambda: published.hessian_(H, X),
    }
    if peer := bench.peer:
        cases[peer.name] = lambda: peer.hessian(H, X)
    return bench.measure(
        "hessian",
        f"{bench.tokens} tokens, n={n}",
        n,
        cases,
        limit=hessian.limit(bench.tokens, n),
        extra=extra,
    )


def run(bench: Bench) -> list[Measurement]:
    return [found for n in bench.columns for found in one(bench, n)]


if __name__ == "__main__":
    common.main(__doc__, {"hessian": run})
