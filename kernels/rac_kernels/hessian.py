"""The Hessian of a layer's squared error: H += Xᵀ diag(w) X, the upper triangle only.

With X [tokens, n] the inputs that a linear layer saw, ‖X Wᵀ − X Qᵀ‖² = tr((W − Q) H (W − Q)ᵀ) for H = Xᵀ X, so H is all
that a solver needs to know of the calibration tokens. A weight w_t counts token t that often; the solvers' damping is
relative to H's diagonal, so H is a sum and is never rescaled.

H is symmetric: n(n + 1) FLOP a token instead of 2n². Products of two bf16 or fp16 numbers are exact in fp32, so tokens
are never copied to fp32 in memory, and with sums in fp32 only their order differs from the plain way. Weights other
than 0 and 1 are applied as √w x to both factors, which keeps H positive semidefinite; tokens of weight 0 are left out
whatever they hold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_kernels import native
from rac_kernels.backend import choose

_SIDE = 2048  # rows of H that the reference updates at a time


def hessian_accumulate_(H: Tensor, X: Tensor, weights: Tensor | None = None, backend: str = "auto") -> Tensor:
    """H += Xᵀ diag(weights) X in place, in the upper triangle including the diagonal; returns H.

    H: [n, n] fp32, contiguous rows; what lies below the diagonal is neither read nor written. X: [tokens, n] bf16, fp16
    or fp32 of any strides, on H's device. weights: [tokens], finite and at least 0 (checked on the CPU; on a GPU a
    negative weight gives NaN); None means 1 each. ``backend`` as in `rac_kernels.backend.choose`.

    Errors against fp64 are those of an fp32 matrix product of the same tokens. Raises ValueError if shapes, dtypes or
    devices do not fit.
    """
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.dtype != torch.float32:
        raise ValueError(f"H must be a square fp32 matrix, not {H.dtype} {list(H.shape)}")
    if H.shape[0] > 1 and H.stride(1) != 1:
        raise ValueError(f"H must have contiguous rows; its strides are {H.stride()}")
    check_tokens(X, weights, H, "H", H.shape[0])
    if weights is not None:
        weights = weights.to(torch.float32).contiguous()
    _accumulate(H, X, weights, choose(backend, H.device))
    return H


def check_tokens(X: Tensor, weights: Tensor | None, target: Tensor, name: str, n: int) -> None:
    """Raise ValueError unless tokens X [tokens, n] and their weights can be counted into `target`, called `name`."""
    if X.ndim != 2 or X.shape[1] != n:
        raise ValueError(f"X must be [tokens, {n}] to fit {name} {list(target.shape)}, not {list(X.shape)}")
    if X.dtype not in native.DTYPES:
        raise ValueError(f"X must be bf16, fp16 or fp32, not {X.dtype}")
    if X.device != target.device:
        raise ValueError(f"X is on {X.device}, {name} on {target.device}")
    if weights is None:
        return
    if weights.shape != X.shape[:1]:
        raise ValueError(f"weights must be [{X.shape[0]}], one a token, not {list(weights.shape)}")
    if weights.device != X.device:
        raise ValueError(f"weights are on {weights.device}, X on {X.device}")
    if weights.device.type == "cpu" and not ((weights >= 0) & (weights < torch.inf)).all():
        raise ValueError("weights must be finite and at least 0")


def hessian_accumulate_reference(H: Tensor, X: Tensor, weights: Tensor | None = None) -> Tensor:
    """The same in plain torch, for any device, H of any floating dtype: the sums are made in it."""
    x = X.to(H.dtype)
    if weights is not None:
        w = weights.to(H.dtype)[:, None]
        x = torch.where(w == 0, 0, x * w.sqrt())
    for lo in range(0, H.shape[0], _SIDE):
        product = x[:, lo : lo + _SIDE].T @ x[:, lo:]
        H[lo : lo + _SIDE, lo:] += product.triu_()
    return H


@torch.library.custom_op("rac::hessian_accumulate_", mutates_args=("H",))
def _accumulate(H: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    """H += Xᵀ diag(weights) X by one backend, the arguments having been checked."""
    if backend == "reference":
        hessian_accumulate_reference(H, X, weights)
    else:
        _native(H, X, weights)


@_accumulate.register_fake
def _(H: Tensor, X: Tensor, weights: Tensor | None, backend: str) -> None:
    return None


def _native(H: Tensor, X: Tensor, weights: Tensor | None) -> None:
    tokens, n = X.shape
    native.library().hessian(
        H.data_ptr(),
        H.stride(0),
        X.data_ptr(),
        native.DTYPES[X.dtype],
        tokens,
        n,
        *X.stride(),
        0 if weights is None else weights.data_ptr(),
        native.threads(),
    )


def symmetrize_(H: Tensor) -> Tensor:
    """Copy the upper triangle of the square matrix H onto the lower one, in place; returns H."""
    if H.ndim != 2 or H.shape[0] != H.shape[1]:
        raise ValueError(f"H must be square, not {list(H.shape)}")
    for lo in range(0, H.shape[0], _SIDE):
        hi = lo + _SIDE
        corner = H[lo:hi, lo:hi]
        corner.copy_(corner.triu() + corner.triu(1).T)
        H[hi:, lo:hi] = H[lo:hi, hi:].T
    return H
