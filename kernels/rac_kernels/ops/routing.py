"""Tokens of a mixture of experts by the experts they go to. Plain torch on any device is all there is."""

from __future__ import annotations

from torch import Tensor


def slots_by_expert(chosen: Tensor, experts: int) -> list[Tensor]:
    """The slots that go to each of the experts, in order: numbers into `chosen`, flattened; number // k is the token.

    chosen: [tokens, k] integers below `experts`. One sort, and one look at the counts from the host.
    """
    slots = chosen.flatten()
    return list(slots.argsort(stable=True).split(slots.bincount(minlength=experts).tolist()))


def add_expert_(out: Tensor, output: Tensor, tokens: Tensor, shares: Tensor) -> Tensor:
    """out[tokens] += shares · output in place; returns out.

    out: [all tokens, n]. output: [m, n] of the expert. tokens: [m], no number twice. shares: [m].
    """
    added = output * shares[:, None]
    return out.index_add_(0, tokens, added.to(out.dtype))
