"""Chunks of calibration tokens, which go through a block together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` up to `stop`: whole sequences of `lengths` behind one another, or a part of one that is longer.

    A part is the tokens from `offset` on of a sequence of `lengths[0]` tokens. Parts go through a block in order.
    """

    start: int
    stop: int
    lengths: tuple[int, ...]
    offset: int = 0

    @property
    def is_part(self) -> bool:
        """Whether there is more of the sequence in other chunks."""
        return self.stop - self.start < self.lengths[0]

    def positions(self, device: torch.device) -> Tensor:
        """Where each token [tokens] stands in its sequence, counted from 0."""
        ranges = torch.cat([torch.arange(length, device=device) for length in self.lengths])
        return ranges[self.offset : self.offset + self.stop - self.start]
