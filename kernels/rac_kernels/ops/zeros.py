"""Zeros of a matrix, counted."""

from __future__ import annotations

from torch import Tensor


def count_zeros(W: Tensor) -> int:
    """Count the elements of W, of any shape, dtype and strides, that are +0 or −0. NaN is not."""
    return W.numel() - int(W.count_nonzero())
