"""Adam on the weights that stay: steps along the gradient of any error, with the mask kept.

A matrix's steps are measured by the root mean square of its kept weights, so that one rate suits matrices of any scale.
What was zero at the start stays +0.0.

Reference: Kingma and Ba, "Adam" (arXiv 1412.6980), with β = 0.9 and 0.99.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BETAS = (0.9, 0.99)

SMALLEST = 1e-12  # running root mean square of a gradient below which nothing moves


class MaskedAdam:
    """Moves `weights`, fp32 matrices of any shapes, in place. Three more of their size are held."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._masks = [weight != 0 for weight in weights]
        self._sizes = [
            float((weight.square().sum() / mask.sum().clamp(min=1)).sqrt())
            for weight, mask in zip(self._weights, self._masks, strict=True)
        ]
        self._means = [torch.zeros_like(weight) for weight in weights]
        self._squares = [torch.zeros_like(weight) for weight in weights]
        self._steps = 0

    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One step against the `gradients`, which are used up, of at most about `rate` times a weight's usual size."""
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in BETAS)
        of_all = (self._weights, self._masks, self._sizes, self._means, self._squares, gradients)
        for weight, mask, size, mean, square, gradient in zip(*of_all, strict=True):
            gradient *= mask
            mean.lerp_(gradient, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            root = torch.div(square, second, out=gradient).sqrt_().add_(SMALLEST)
            weight.addcdiv_(mean, root, value=-rate * size / first)
