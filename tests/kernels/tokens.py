"""Token matrices and their weights as hypothesis draws them, poisoned beyond the edges."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from rac_kernels.testing import Poisoned

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["rows", "columns", "steps", "one row"]
WEIGHTS = ["none", "mask", "general", "zero"]


@dataclass(frozen=True)
class Case:
    """One call's input, made the same way each time from what it is called."""

    tokens: int
    n: int
    dtype: torch.dtype
    layout: str
    weighting: str

    def X(self) -> Tensor:
        """[tokens, n] inside memory full of NaN."""
        g = torch.Generator().manual_seed(self.tokens * 1000 + self.n)
        values = (torch.randn(self.tokens, self.n, generator=g) + 0.5).to(self.dtype)
        if self.layout == "one row":
            return values[:1].expand(self.tokens, self.n) if self.tokens else values
        steps = (2, 2) if self.layout == "steps" else (1, 1)
        return Poisoned(values, turned=self.layout == "columns", steps=steps).view

    def weights(self) -> Tensor | None:
        """[tokens] fp32, or None."""
        g = torch.Generator().manual_seed(self.tokens)
        if self.weighting == "mask":
            return (torch.rand(self.tokens, generator=g) < 0.5).float()
        if self.weighting == "general":
            return torch.rand(self.tokens, generator=g) * 3
        return torch.zeros(self.tokens) if self.weighting == "zero" else None


def cases(most_tokens: int, most_columns: int) -> st.SearchStrategy[Case]:
    """Odd sizes, every dtype, layout and weighting."""
    return st.builds(
        Case,
        st.integers(0, most_tokens),
        st.integers(1, most_columns),
        st.sampled_from(DTYPES),
        st.sampled_from(LAYOUTS),
        st.sampled_from(WEIGHTS),
    )


def exact(X: Tensor, weights: Tensor | None) -> Tensor:
    """Xᵀ diag(weights) X in fp64."""
    x = X.double()
    return x.T @ (x if weights is None else x * weights.double()[:, None])


def plain(X: Tensor, weights: Tensor | None) -> Tensor:
    """The same as torch does it in fp32: the yardstick of accuracy."""
    x = X.float()
    return x.T @ (x if weights is None else x * weights[:, None])
