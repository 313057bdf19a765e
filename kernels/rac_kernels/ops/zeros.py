"""Zeros of a matrix: counted, and put there. Plain torch on any device is all there is."""

from __future__ import annotations

import torch
from torch import Tensor


def count_zeros(W: Tensor) -> int:
    """Count the elements of W, of any shape, dtype and strides, that are +0 or −0. NaN is not."""
    return W.numel() - int(W.bool().count_nonzero())  # that of 16 bits is counted one by one


def zeroed(W: Tensor, mask: Tensor) -> Tensor:
    """A copy of W, of any float dtype, that is +0 where `mask`, a bool of its shape, is True.

    As ``W.masked_fill(mask, 0)``, which on a CPU goes through numbers of 16 bits one by one: a tenth of its time.
    """
    if W.device.type != "cpu" or W.dtype.itemsize != 2:
        return W.masked_fill(mask, 0)
    return (W.view(torch.int16) & (mask.to(torch.int16) - 1)).view(W.dtype)
