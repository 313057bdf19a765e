"""Observers of the inputs of a block's matrices during a pass of tokens through the block."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

Observer = Callable[[Tensor, Tensor | None], None]

"""Called with an input [tokens, columns] and the numbers of its tokens in the chunk (None: all are there)."""


class AllObserved(Exception):
    """Every observer has been called, so that the pass may end."""


class Observation:
    """The observers of one pass through a block, by the names of the inputs that they are to see.

    With `through` the pass goes to the block's end, else it ends (`AllObserved`) when every observer has been called.
    """

    def __init__(self, observers: Mapping[str, Observer], through: bool) -> None:
        self.observers, self.through = observers, through
        self.left = set(observers)

    def show(self, name: str, x: Tensor, tokens: Tensor | None = None) -> None:
        """Call the observer of an input, if there is one; ends the pass if it was the last."""
        if name in self.left:
            self.left.discard(name)
            self.observers[name](x, tokens)
        self.end_if_done()

    def end_if_done(self) -> None:
        """Raise `AllObserved` if no observer is left and the pass need not go to the block's end."""
        if not self.left and not self.through:
            raise AllObserved
