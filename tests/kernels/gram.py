"""Gram matrices of every kind the kernels meet, by name."""

from __future__ import annotations

import torch
from torch import Tensor


def gram(kind: str, n: int, seed: int = 0) -> Tensor:
    """H = XᵀX [n, n] fp32, exactly symmetric, of inputs X with the trait that `kind` names."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(2 * n + 8, n, generator=g, dtype=torch.float64)
    if kind == "correlated":
        X = X @ (0.1 * torch.eye(n) + torch.randn(n, n, generator=g) / n**0.5).double()
    elif kind == "offset":
        X += 5
    elif kind == "rank-deficient":
        X = X[: max(n // 8, 1)]
    elif kind == "low-rank plus noise":
        X = X[:, :4] @ torch.randn(4, n, generator=g, dtype=torch.float64)[: X[:, :4].shape[1]] + 0.05 * X
    elif kind == "outliers":
        X[:, ::29] *= 300
    elif kind == "wide range":
        X *= torch.logspace(-10, 10, n, dtype=torch.float64)[torch.randperm(n, generator=g)]
    elif kind == "dead":
        X[:, torch.randperm(n, generator=g)[: max(n // 6, 1)]] = 0
    else:
        assert kind == "plain"
    return (X.T @ X).float()


KINDS = ["plain", "correlated", "offset", "rank-deficient", "low-rank plus noise", "outliers", "wide range", "dead"]
