"""Chunks of calibration tokens, which go through a block together."""

from __future__ import annotations

import itertools
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

    def pieces(self, most: int) -> list[Chunk]:
        """The chunk in pieces of whole sequences, of at most `most` tokens and an eighth, where that can be.

        Sequences of equal length, which are one batch in attention, stay together, and so do parts of a sequence. The
        last piece is no smaller than an eighth of `most`.
        """
        if self.is_part or self.stop - self.start <= most:
            return [self]
        pieces = list[tuple[int, ...]]()
        for _, run in itertools.groupby(self.lengths):
            alike = tuple(run)
            if pieces and sum(pieces[-1]) + sum(alike) <= most:
                pieces[-1] += alike
            else:
                pieces.append(alike)
        if len(pieces) > 1 and 8 * sum(pieces[-1]) < most:
            last = pieces.pop()
            pieces[-1] += last
        ends = list(itertools.accumulate(map(sum, pieces), initial=self.start))
        return [Chunk(start, stop, own) for start, stop, own in zip(ends, ends[1:], pieces, strict=False)]

    def filled(self, grain: int, end: int) -> Chunk:
        """The chunk with tokens behind it, as a sequence of their own, so that their number is a multiple of `grain`.

        There are tokens up to `end`; where they do not suffice, and of a part of a sequence, the chunk is as it was.
        """
        more = -(self.stop - self.start) % grain
        if self.is_part or not more or self.stop + more > end:
            return self
        return Chunk(self.start, self.stop + more, (*self.lengths, more))
