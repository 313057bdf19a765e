"""Squared norms of outputs, summed over tokens or a token each. Plain torch on any device is all there is."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_norm_accumulate_(s: Tensor, X: Tensor, weights: Tensor | None = None) -> Tensor:
    """s += Σ_t weights_t ‖X_t‖² in place; returns s.

    s: [] fp64. X: [tokens, n], any float dtype, on s's device. weights: [tokens] fp32; None means 1 each. A token's
    norm is made in fp32, the sum over tokens in fp64.
    """
    squares = torch.linalg.vector_norm(X, dim=1, dtype=torch.float32).square().double()
    s += (squares if weights is None else squares * weights).sum()
    return s


def squared_gaps(found: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """‖found_t − wanted_t‖² and ‖wanted_t‖² of each token, both [tokens] fp64.

    found and wanted: [tokens, n], any float dtype, on one device. A token's norms are made in fp32.
    """
    gap = torch.linalg.vector_norm(found.float() - wanted.float(), dim=1)
    whole = torch.linalg.vector_norm(wanted, dim=1, dtype=torch.float32)
    return gap.double().square(), whole.double().square()
