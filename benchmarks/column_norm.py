"""Squared column norms: one pass over bf16 tokens, against torch's norm of an fp32 copy."""

from __future__ import annotations

import common
import torch
from common import OURS, Bench, Measurement
from torch import Tensor

from rac_kernels import column_norm_accumulate_
from rac_kernels.measure import published
from rac_kernels.ops import column_norm


def one(bench: Bench, n: int) -> list[Measurement]:
    X = bench.activations(n)
    s = torch.zeros(n, device=bench.device)
    plain = "published: norm of an fp32 copy"
    exact = X.double().square().sum(0)

    def error(found: Tensor) -> dict[str, str]:
        return {"error": f"{((found.double() - exact).abs() / exact.max()).max().item():.1e}"}

    extra = {
        OURS: error(column_norm_accumulate_(s.clone(), X)),
        plain: error(published.column_norm_(s.clone(), X)),
    }
    cases: dict[str, common.Case] = {
        OURS: lambda: column_norm_accumulate_(s, X),
        plain: lambda: published.column_norm_(s, X),
        "torch: squares summed": lambda: s.add_(X.float().square().sum(0)),
    }
    return bench.measure(
        "column_norm",
        f"{bench.tokens} tokens, n={n}",
        n,
        cases,
        limit=column_norm.limit(bench.tokens, n),
        extra=extra,
    )


def run(bench: Bench) -> list[Measurement]:
    return [found for n in bench.columns for found in one(bench, n)]


if __name__ == "__main__":
    common.main(__doc__, {"column_norm": run})
