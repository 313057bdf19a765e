"""What turns hidden states behind the last layer into logits: the final norm and lm_head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

LOGIT_ROWS = 512  # tokens whose logits exist at a time


class Readout:
    """The final norm, lm_head [vocabulary, hidden] with its bias [vocabulary], and what a config has done to logits."""

    def __init__(self, norm: nn.Module, head: Tensor, bias: Tensor | None, config: Any) -> None:
        self._norm, self._head, self._bias = norm, head, bias
        scaling = getattr(config, "logits_scaling", None)
        self._scale = float(getattr(config, "logit_scale", None) or 1.0) / float(scaling or 1.0)
        self._cap: float | None = getattr(config, "final_logit_softcapping", None)

    def logits(self, hidden: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The logits [n, vocabulary] fp32 of hidden states [tokens, hidden], some at a time, with the first's place."""
        for at in range(0, len(hidden), LOGIT_ROWS):
            yield at, self._logits(self._norm(hidden[at : at + LOGIT_ROWS]))

    def gradient(self, hidden: Tensor, lose: Callable[[int, Tensor], None]) -> Tensor:
        """The gradient of a loss by hidden states [tokens, hidden], in their dtype.

        `lose` is given the place of the first and the logits [n, vocabulary] fp32 of some tokens at a time, and puts
        the loss's gradient in the place of the logits.
        """
        made = torch.empty_like(hidden)
        for at in range(0, len(hidden), LOGIT_ROWS):
            with torch.enable_grad():
                some = hidden[at : at + LOGIT_ROWS].detach().requires_grad_(True)
                normed = self._norm(some)
            logits = self._logits(normed.detach())
            slope = None if self._cap is None else 1 - (logits / self._cap).square_()
            lose(at, logits)
            if slope is not None:
                logits *= slope
            if self._scale != 1:
                logits *= self._scale
            (made[at : at + LOGIT_ROWS],) = torch.autograd.grad(normed, some, logits.to(normed.dtype) @ self._head)
        return made

    def _logits(self, normed: Tensor) -> Tensor:
        logits = nn.functional.linear(normed, self._head, self._bias).float()
        if self._scale != 1:
            logits *= self._scale
        return logits if self._cap is None else logits.div_(self._cap).tanh_().mul_(self._cap)
