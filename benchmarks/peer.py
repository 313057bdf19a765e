"""llm-compressor, where it is installed, as it is compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
