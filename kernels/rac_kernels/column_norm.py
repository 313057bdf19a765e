"""Squared column norms, s_j += Σ_t w_t x_tj²: the diagonal of the Hessian, all that Wanda asks of the calibration.

Wanda scores a weight |W_ij| ‖x_j‖; the caller takes the root. One pass over X, bound by memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels import native
from rac_kernels.backend import choose
from rac_kernels.hessian import check_tokens


def column_norm_accumulate_(s: Tensor, X: Tensor, weights: Tensor | None = None, backend: str = "auto") -> Tensor:
    """s += Σ_t weights_t X_t² in place; returns s.

    s: [n] fp32, contiguous. X: [tokens, n] bf16, fp16 or fp32 of any strides, on s's device. weights: [tokens], finite
    and at least 0 (checked on the CPU); None means 1 each; tokens of weight 0 are left out whatever they hold.

    The sums of one call are made in fp64. Raises ValueError if shapes, dtypes or devices do not fit.
    """
    if s.ndim != 1 or s.dtype != torch.float32 or not s.is_contiguous():
        raise ValueError(f"s must be a contiguous fp32 vector, not {s.dtype} {list(s.shape)} of strides {s.stride()}")
    check_tokens(X, weights, s, "s", s.shape[0])
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    _accumulate(s, X, weights, choose(backend, s.device))
    return s


def column_norm_accumulate_reference(s: Tensor, X: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same in plain torch, for any device."""
    squares = X.double().square_()
    if weights is not None:
        w = weights.double()[:, None]
        squares = torch.where(w == 0, 0, squares * w)
    return s.copy_(s + squares.sum(0))


@torch.library.custom_op("rac::column_norm_accumulate_", mutates_args=("s",))
def _accumulate(s: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    """s += Σ_t weights_t X_t² by one backend, the arguments having been checked."""
    if backend == "reference":
        column_norm_accumulate_reference(s, X, weights)
    else:
        _native(s, X, weights)


@_accumulate.register_fake
def _(s: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    return None


def _native(s: Tensor, X: Tensor, weights: Tensor | None) -> None:
    tokens, n = X.shape
    native.library().column_norm(
        s.data_ptr(),
        X.data_ptr(),
        native.DTYPES[X.dtype],
        tokens,
        n,
        *X.stride(),
        0 if weights is None else weights.data_ptr(),
        native.threads(),
    )
