"""The weights that come nearest to the dense model's outputs on the pruned model's inputs.

A matrix in a pruned model is given X′ where the dense model's is given X. Aiming at the dense outputs Y,

    min ‖X′ Vᵀ − Y‖² + λ ‖V − W‖²,   so   Vᵀ = (H + λI)⁻¹ (C + λ Wᵀ),   H = X′ᵀX′,   C = X′ᵀY,

and since the cost of any Q is that of V plus tr((Q − V) (H + λI) (Q − V)ᵀ), a solver that prunes V under H prunes W to
match Y. H + λI = U Uᵀ is factored for the sweep anyhow: two triangular solves, 2·rows·n² FLOP, are all this costs.

Reference: for quantisation Li et al., "GPTAQ" (arXiv 2504.02692).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels.ops.factor import Factor

_ROWS = 4096  # rows of W solved at a time


def output_cross(A: Tensor, W: Tensor) -> Tensor:
    """C = X′ᵀ(X Wᵀ) [n, rows] fp32 from A = X′ᵀX [n, n] fp32 and W [rows, n], any float dtype.

    2·rows·n² FLOP once, where X′ᵀ(X Wᵀ) from the tokens takes 4·rows·n a token and A 2·n² a token.
    """
    return A @ W.T.to(A.dtype)


def matched_target(factor: Factor, C: Tensor, W: Tensor) -> Tensor:
    """V [rows, n] fp32 with (H + λI) Vᵀ = C + λ Wᵀ, H + λI = U Uᵀ and λ being the factor's.

    C: [n, rows] fp32, X′ᵀY. W: [rows, n], any float dtype, on the factor's device; both are read only. Columns of dead
    inputs become zero: nothing comes from there. Raises ValueError for shapes that do not fit.
    """
    U = factor.U
    rows, n = W.shape
    if U.shape != (n, n) or C.shape != (n, rows):
        raise ValueError(
            f"W {list(W.shape)} asks for U [{n}, {n}] and C [{n}, {rows}], not {list(U.shape)} and {list(C.shape)}"
        )
    V = torch.empty(rows, n, dtype=U.dtype, device=U.device)
    for lo in range(0, rows, _ROWS):
        some = slice(lo, lo + _ROWS)
        right = torch.add(C[:, some], W[some].T.to(U.dtype), alpha=factor.ridge)
        # Only U's triangle is read; below it lies H.
        half = torch.linalg.solve_triangular(U, right, upper=True)
        V[some] = torch.linalg.solve_triangular(U.T, half, upper=False).T
    V[:, factor.dead] = 0
    return V


def workspace(weights: int, n: int, shared: bool) -> int:
    """Bytes that V takes while it is made of so many weights in rows of n, V included.

    `shared`: whether C is made of X′ᵀX first (`output_cross`).
    """
    return (8 if shared else 4) * weights + 12 * min(weights, _ROWS * n)
