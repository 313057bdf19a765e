"""One statistic blended with another of the same inputs' shape. Plain torch on any device is all there is."""

from __future__ import annotations

from torch import Tensor


def blend_(H: Tensor, other: Tensor, weight: float) -> Tensor:
    """H += weight · other in place; returns H.

    H and other: of one shape and dtype, full or with one triangle in use. Raises ValueError where they are not.
    """
    if H.shape != other.shape or H.dtype != other.dtype:
        raise ValueError(f"{H.dtype} {list(H.shape)} cannot be blended with {other.dtype} {list(other.shape)}")
    return H.add_(other, alpha=weight)
