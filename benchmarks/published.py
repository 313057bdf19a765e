"""What the engine is compared with: the published steps written plainly, and llm-compressor where it is installed.

The plain versions do what IST-DASLab's SparseGPT does (arXiv 2301.00774): fp32 throughout, a full XᵀX, three
factorizations, one column at a time. They run on any device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def hessian_(H: Tensor, X: Tensor) -> Tensor:
    """H [n, n] fp32 += XᵀX, all of it, from X [tokens, n] cast to fp32."""
    X32 = X.float()
    return H.addmm_(X32.T, X32)


def inverse_factor(H: Tensor, damping: float = 0.01) -> Tensor:
    """R [n, n] fp32 upper with H⁻¹ = RᵀR, by Cholesky, inverse and Cholesky again; H is not changed."""
    H = H.clone()
    H.diagonal().add_(damping * H.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)


def sweep(W: Tensor, R: Tensor, sparsity: float, pattern: tuple[int, int] | None = None, block: int = 128) -> Tensor:
    """The right-looking loop over columns with lazy updates of a block: Q [rows, n] fp32 from W and R."""
    W = W.float().clone()
    columns = W.shape[1]
    for lo in range(0, columns, block):
        hi = min(lo + block, columns)
        part, corner = W[:, lo:hi].clone(), R[lo:hi, lo:hi]
        errors, scale = torch.zeros_like(part), corner.diagonal()
        mask = torch.zeros_like(part, dtype=torch.bool)
        if pattern is None:
            scores = part.square() / scale.square()
            mask = scores <= scores.flatten().sort().values[int(scores.numel() * sparsity)]
        for j in range(hi - lo):
            if pattern is not None and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                scores = part[:, group].square() / scale[group].square()
                mask.scatter_(1, j + scores.topk(pattern[1] - pattern[0], largest=False).indices, True)
            kept = part[:, j].masked_fill(mask[:, j], 0)
            error = (part[:, j] - kept) / scale[j]
            part[:, j:] -= error[:, None] @ corner[None, j, j:]
            part[:, j], errors[:, j] = kept, error
        W[:, lo:hi] = part
        W[:, hi:] -= errors @ R[lo:hi, hi:]
    return W


def column_norm_(s: Tensor, X: Tensor) -> Tensor:
    """s [n] fp32 += the squared norms of the columns of X [tokens, n], cast to fp32, as Wanda's code takes them."""
    return s.add_(torch.norm(X.float(), p=2, dim=0) ** 2)


def conjugate_gradients(Q: Tensor, H: Tensor, target: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Masked conjugate gradients as ALPS runs them (arXiv 2406.07831), an operation a line; H [n, n] full."""
    inverse = 1 / H.diagonal()
    Q = Q * mask
    R = (target - Q) @ H * mask
    Z = R * inverse
    P = Z.clone()
    size = (R * Z).sum(1, keepdim=True)
    for _ in range(iterations):
        A = P @ H
        step = size / (P * A).sum(1, keepdim=True)
        Q = Q + step * P
        R = (R - step * A) * mask
        Z = R * inverse
        new = (R * Z).sum(1, keepdim=True)
        P = Z + new / size * P
        size = new
    return Q


class LLMCompressor:
    """llm-compressor's own functions, called as its SparseGPT modifier calls them; `load` gives None without it."""

    def __init__(self, module: Any, version: str) -> None:
        self._module = module
        self.name = f"llm-compressor {version}"

    @classmethod
    def load(cls) -> LLMCompressor | None:
        try:
            import llmcompressor
            from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
        except ImportError:
            return None
        return cls(sgpt_sparsify, llmcompressor.__version__)

    def hessian(self, H: Tensor, X: Tensor) -> Tensor:
        """One call on one sequence X [tokens, n]; it scales H and adds in place."""
        layer = torch.nn.Linear(X.shape[1], 1, bias=False, device="meta")
        return self._module.accumulate_hessian(X, layer, H, 1)[0]

    def sweep(self, W: Tensor, R: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
        """Its pruning of W without its factorization: R is handed to it where it would compute it."""
        real = torch.linalg.cholesky, torch.cholesky_inverse

        def cholesky(H: Tensor, *, upper: bool = False) -> Tensor:
            return R if upper else H

        torch.linalg.cholesky, torch.cholesky_inverse = cholesky, cholesky  # type: ignore[assignment]
        try:
            return self.prune(W, torch.eye(W.shape[1], device=W.device), sparsity, pattern)
        finally:
            torch.linalg.cholesky, torch.cholesky_inverse = real

    def prune(self, W: Tensor, H: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
        """Its whole pruning of W [rows, n] under H [n, n], which it destroys."""
        layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        layer.weight = torch.nn.Parameter(W, requires_grad=False)
        n, m = pattern or (0, 0)
        return self._module.sparsify_weight(
            module=layer,
            hessians_dict={layer: H},
            sparsity=sparsity,
            prune_n=m - n if pattern else 0,
            prune_m=m,
            block_size=128,
            dampening_frac=0.01,
            preserve_sparsity_mask=False,
        )[1]
