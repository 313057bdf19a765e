"""States of recurrent mixers: what a linear attention, a state-space model or a convolution hands to the next token.

Transformers' modules ask their cache for these, a row a sequence. `States` answers for one module.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CALL_TOKENS = 1024
"""Tokens that go through a recurrent module in one call, of one sequence or of several."""

_NAMES = ("cache", "cache_params", "past_key_values")
"""Names of the cache among the arguments of a module, by transformers' version."""


def cache_name(module: nn.Module) -> str:
    """The name that the cache has among the arguments of a mixer of transformers."""
    kind: Any = type(module)
    return _cache_name(kind)


@functools.cache
def _cache_name(kind: Any) -> str:
    taken = inspect.signature(kind.forward).parameters
    return next((name for name in _NAMES if name in taken), _NAMES[0])


class States:
    """The states of a recurrent module for a row of sequences: transformers' cache, as far as the module asks for it.

    The convolution's are its newest inputs [rows, channels, kernel], the recurrent one is the module's own [rows, …].
    """

    def __init__(self) -> None:
        self.convolution: dict[int, Tensor] = {}
        self.recurrent: dict[int, Tensor] = {}

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The convolution's state; None before the first token. A module may change it in place."""
        return self.convolution.get(state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The recurrent state; None before the first token. A module may change it in place."""
        return self.recurrent.get(state_idx)

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Take the convolution's new inputs [rows, channels, tokens]; returns them behind those held before."""
        before = self.convolution.get(state_idx)
        every = conv_states if before is None else torch.cat((before, conv_states), -1)
        size = conv_kernel_size or (conv_states if before is None else before).shape[-1]
        self.convolution[state_idx] = F.pad(every, (max(size - every.shape[-1], 0), 0))[..., -size:].clone()
        return every

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """Take the new recurrent state."""
        self.recurrent[state_idx] = recurrent_states
        return recurrent_states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int = 0) -> bool:
        """Whether a token was seen."""
        return state_idx in self.convolution or state_idx in self.recurrent

    def is_recording_past(self, layer_idx: int) -> bool:
        """Whether former states are kept to go back to: never."""
        return False

    def drop(self, row: int) -> None:
        """Let go of a row, whose place the last one takes."""
        for held in (self.convolution, self.recurrent):
            for number, state in held.items():
                state[row] = state[-1]
                held[number] = state[:-1]

    def append(self, other: States) -> None:
        """Put the rows of other states behind these."""
        for held, new in ((self.convolution, other.convolution), (self.recurrent, other.recurrent)):
            for number, state in new.items():
                held[number] = torch.cat((held[number], state)) if number in held else state


def run_packed(module: nn.Module, x: Tensor, lengths: Sequence[int], states: States | None = None) -> Tensor:
    """A recurrent module's output [tokens, width] for sequences of `lengths` behind one another in x [tokens, hidden].

    Neighbours of equal length may go through together. Each sequence's states are put behind the rows of `states`.
    """
    parts, start = [], 0
    for length, alike in itertools.groupby(lengths):
        count = len(list(alike))
        together = max(CALL_TOKENS // length, 1)
        for first in range(0, count, together):
            some = min(together, count - first)
            new = States()
            own = x[start : start + some * length].unflatten(0, (some, length))
            parts.append(run_on(module, own, new).flatten(0, 1))
            start += some * length
            if states is not None:
                states.append(new)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def run_on(module: nn.Module, x: Tensor, states: States) -> Tensor:
    """A recurrent module's output [rows, tokens, width] for the next tokens x [rows, tokens, hidden] of sequences.

    `states` are those behind the tokens before, and then behind these. No more than `CALL_TOKENS` go through in a call:
    what transformers' modules make of a token, written in plain PyTorch, takes a hundred times its size.
    """
    length, name = x.shape[1], cache_name(module)
    count = -(-length * len(x) // CALL_TOKENS)
    if count == 1 or len(x) > 1:
        made: Tensor = module(x, **{name: states})
        return made
    ends = [length * number // count for number in range(count + 1)]
    parts = [module(x[:, a:b], **{name: states}) for a, b in itertools.pairwise(ends)]
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class Workspace:
    """Bytes that a recurrent mixer takes."""

    token: int = 0
    """Of a token of a call."""
    state: int = 0
    """Of a sequence's recurrent state in fp32."""


def workspace(mixer: nn.Module, size: int) -> Workspace:
    """Bytes that a recurrent mixer of transformers takes, activations having `size` bytes.

    Counted in what its plain PyTorch makes: a gated delta net and Mamba 2 compute in fp32.
    """
    at: Any = mixer
    if hasattr(mixer, "head_k_dim"):  # per head queries, keys, values and products of the tokens of a chunk of 64
        keys, values = at.num_v_heads * at.head_k_dim, at.num_v_heads * at.head_v_dim
        token = 4 * (6 * keys + 7 * values + 3 * 64 * at.num_v_heads) + size * at.conv_dim
        return Workspace(token, 4 * keys * at.head_v_dim)
    if hasattr(mixer, "ssm_state_size"):
        inner, states = at.num_heads * at.head_dim, at.num_heads * at.ssm_state_size
        grouped = 2 * at.n_groups * at.ssm_state_size
        own = 4 * size * inner  # what comes in and goes out, in the activations' own format
        token = own + 4 * (6 * inner + 4 * states + 2 * grouped) + 10 * at.chunk_size * at.num_heads
        return Workspace(token, 4 * inner * at.ssm_state_size)
    columns = next(part.weight.shape[1] for part in mixer.modules() if isinstance(part, nn.Linear))
    return Workspace(6 * size * int(columns))
