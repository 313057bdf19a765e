"""Gram matrices of every kind the kernels meet, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def gram(kind: str, n: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """H = XᵀX [n, n] fp32, exactly symmetric, of inputs X with the trait that `kind` names; made on the device."""
    g = torch.Generator(device).manual_seed(seed)
    wide: dict[str, Any] = {"generator": g, "device": device, "dtype": torch.float64}

    def some(count: int) -> Tensor:
        return torch.randperm(n, generator=g, device=device)[:count]

    X = torch.randn(2 * n + 8, n, **wide)
    if kind == "correlated":
        mixed = torch.randn(n, n, generator=g, device=device) / n**0.5
        X = X @ (0.1 * torch.eye(n, device=device) + mixed).double()
    elif kind == "offset":
        X += 5
    elif kind == "rank-deficient":
        X = X[: max(n // 8, 1)]
    elif kind == "low-rank plus noise":
        X = X[:, :4] @ torch.randn(4, n, **wide)[: X[:, :4].shape[1]] + 0.05 * X
    elif kind == "outliers":
        X[:, ::29] *= 300
    elif kind == "wide range":
        X *= torch.logspace(-10, 10, n, dtype=torch.float64, device=device)[some(n)]
    elif kind == "dead":
        X[:, some(max(n // 6, 1))] = 0
    else:
        assert kind == "plain"
    return (X.T @ X).float()


KINDS = ["plain", "correlated", "offset", "rank-deficient", "low-rank plus noise", "outliers", "wide range", "dead"]
