"""Distillation: the divergence from another model's next tokens, and Adam on the weights that a mask keeps.

Of the model to come near to, a token's `count` most probable next tokens are known, and what all others have together.
The divergence is that between these count + 1 parts, which is at most the whole one.

Reference: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), at temperature
1; Kingma and Ba, "Adam" (arXiv 1412.6980), as in `MaskedAdam`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rac_kernels.solvers.adam import BETAS, SMALLEST
from rac_kernels.solvers.tuning import rounded

STEP = 0.0004  # of the first steps, by a weight's usual size; it falls to 0 along a cosine

WARMING = 0.05  # share of the tokens in which it rises

_TINY = 1e-30  # probability below which none is told from it

KEPT_BYTES = 10  # of a kept weight's state: itself and its mean square in fp32, its mean gradient in bf16


def most_probable(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` most probable tokens (or as many as there are) of logits [n, vocabulary] fp32, which are used up.

    Returns log-probabilities [n, count + 1] fp32, the last that of all other tokens together, and ids [n, count] int64.
    """
    count = min(count, logits.shape[1])
    ids = logits.topk(count, dim=1).indices
    parts, total = _parts_(logits, ids)
    return parts.div_(total).clamp_(min=_TINY).log_(), ids


def divergence_(logits: Tensor, wanted: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Σ weights · KL(wanted ‖ softmax(logits)) over the parts that `most_probable` gives, [] fp32.

    logits [n, vocabulary] fp32 become the sum's gradient by them; wanted [n, count + 1], ids [n, count] int64, weights
    [n] fp32.
    """
    parts, total = _parts_(logits, ids)
    found, aim = parts.div_(total).clamp_(min=_TINY), wanted.exp()
    lost = (aim * (wanted - found.log())).sum(1)
    logits.mul_((1 - aim[:, -1:] / found[:, -1:]) / total)
    logits.scatter_(1, ids, found[:, :-1] - aim[:, :-1])
    logits.mul_(weights[:, None])
    return lost @ weights


def step_size(share: float) -> float:
    """The step when that share of all tokens, 0 to 1, has been gone through."""
    return STEP * min(share / WARMING, 1) * (1 + math.cos(math.pi * share)) / 2


class KeptWeights:
    """The weights of a matrix that a mask keeps, and the state of Adam on them: `KEPT_BYTES` each and a bit of mask."""

    def __init__(self, parts: Mapping[str, Tensor]) -> None:
        """Go on from the `parts` of an earlier one."""
        self.parts = dict(parts)

    @classmethod
    def of(cls, weight: Tensor) -> KeptWeights:
        """All that is not zero in a matrix [rows, columns] of any float dtype."""
        mask = weight != 0
        values = weight[mask].float()
        size = values.square().mean().sqrt() if len(values) else values.new_zeros(())
        return cls(
            {
                "mask": mask,
                "values": values,
                "mean": torch.zeros_like(values, dtype=torch.bfloat16),
                "square": torch.zeros_like(values),
                "size": size,
            }
        )

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The matrix [rows, columns], rounded to `dtype`; what is not kept is +0.0."""
        mask, values = self.parts["mask"], rounded(self.parts["values"], dtype)
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_scatter_(mask, values)

    def step(self, gradient: Tensor, number: int, share: float) -> None:
        """Step `number`, from 1 on, against a gradient [rows, columns] of any float dtype, at that `share` of all."""
        parts, first, second = self.parts, *(1 - beta**number for beta in BETAS)
        kept = gradient[parts["mask"]].float()
        mean = parts["mean"].float().lerp_(kept, 1 - BETAS[0])
        parts["mean"].copy_(mean)
        parts["square"].mul_(BETAS[1]).addcmul_(kept, kept, value=1 - BETAS[1])
        root = torch.div(parts["square"], second, out=kept).sqrt_().add_(SMALLEST)
        parts["values"].addcdiv_(mean, root, value=-step_size(share) * float(parts["size"]) / first)


def _parts_(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The parts' exponentials [n, count + 1] and their sum [n, 1]; logits become those of the last part, else 0."""
    logits.sub_(logits.amax(1, keepdim=True)).exp_()
    own = logits.gather(1, ids)
    logits.scatter_(1, ids, 0.0)
    parts = torch.cat([own, logits.sum(1, keepdim=True)], 1)
    return parts, parts.sum(1, keepdim=True)
