"""What is shown the inputs of a block's matrices, and the chunks of tokens that pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

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


Tap = Callable[[Tensor, Tensor | None], None]

"""What is shown an input [tokens, columns] and, where not all tokens of the piece are there, which ones are."""


class _Enough(Exception):
    """Everything that was to be seen has been seen."""


class _Viewing:
    """What is to see the inputs of one pass through a block, by the inputs' names."""

    def __init__(self, taps: Mapping[str, Tap], through: bool) -> None:
        self.taps, self.through = taps, through
        self.left = set(taps)

    def see(self, name: str, x: Tensor, tokens: Tensor | None = None) -> None:
        """Show an input, if anything is to see it; ends the pass when nothing else is to be seen."""
        if name in self.left:
            self.left.discard(name)
            self.taps[name](x, tokens)
        self.end()

    def end(self) -> None:
        """End the pass if nothing is left to be seen."""
        if not self.left and not self.through:
            raise _Enough
