"""NaN and infinity found and left out before they spoil a sum. Plain torch on any device is all there is."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype and shape holds no NaN and no infinity.

    Goes by its smallest and largest values, so that nothing of its size is made (but for FP8, widened to bf16).
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    wide = tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.bfloat16)
    return bool(torch.stack(wide.aminmax()).isfinite().all())


def finite_tokens(weights: Tensor | None, *parts: Tensor) -> tuple[list[Tensor], Tensor | None, int]:
    """The tokens, rows of all `parts` [tokens, …], that count and are finite in each of them.

    weights: [tokens] fp32; a token of weight 0 does not count; None: 1 each. Returns the rows of each part, their
    weights [tokens] (None: 1 each), and how many others would have counted but hold NaN or infinity somewhere.
    """
    if weights is None and all(map(all_finite, parts)):
        return list(parts), None, 0
    good = torch.stack([edge.isfinite() for part in parts for edge in (part.amin(-1), part.amax(-1))]).all(0)
    counted = torch.ones_like(good) if weights is None else weights > 0
    good &= counted
    count = int(good.sum())
    dropped = int(counted.sum()) - count
    if count < len(good):
        parts = tuple(part[good] for part in parts)
        weights = None if weights is None else weights[good]
    if weights is not None and bool((weights == 1).all()):
        weights = None
    return list(parts), weights, dropped
