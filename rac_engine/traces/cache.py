"""Keys, values and recurrent states of the sequences that are being decoded."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rac_engine.base.files import pages
from rac_engine.models import States


class Cache:
    """Keys and values of the sequences in flight, a row each: [rows, capacity, heads, d] in every layer.

    Of recurrent mixers, their states, a row each for those that have been in a step.
    """

    def __init__(self, rows: int, longest: int | None = None, on_host: bool = False) -> None:
        """Room for `rows` sequences, of no more than `longest` tokens if that is known.

        Keys and values are in the host's memory, or where they are made.
        """
        self.rows, self.capacity = rows, 0
        self._longest, self._on_host = longest, on_host
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, States] = {}

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens."""
        if length > self.capacity:
            grown = self.capacity * 3 // 2
            self.capacity = max(length, grown if self._longest is None else min(grown, self._longest))
            for layer, tensors in self.layers.items():
                self.layers[layer] = (self._grown(tensors[0]), self._grown(tensors[1]))

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put key and value [tokens, heads, d] at their slots [tokens] = row * capacity + position."""
        if layer not in self.layers:
            self.layers[layer] = (self._empty(key), self._empty(value))
        held = self.layers[layer]
        for buffer, new in zip(held, (key, value), strict=True):
            home = buffer.device
            buffer.view(-1, *new.shape[1:]).index_copy_(0, slots.to(home), new.to(home))

    def read(self, layer: int, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, span, heads, d] on a device, of rows with so many tokens; zeros behind the shorter.

        They are the cache's own where that is their place.
        """
        span = max(lengths)
        keys, values = (held[: len(lengths), :span] for held in self.layers[layer])
        if keys.device == device:
            return keys, values
        return _copied(keys, lengths, device), _copied(values, lengths, device)

    def drop(self, row: int, last: int, length: int) -> None:
        """Let row `row` hold what the `last` one, of `length` tokens, holds, which goes."""
        for tensor in itertools.chain(*self.layers.values()) if row < last else ():
            tensor[row, :length] = tensor[last, :length]
        for states in self.states.values():
            states.drop(row)

    def kept(self, lengths: Sequence[int]) -> Iterator[Tensor]:
        """All that is held of sequences, a row each, of which so many tokens have been in a step."""
        for layer in sorted(self.layers):
            for tensor in self.layers[layer]:
                yield from (tensor[row, :length] for row, length in enumerate(lengths))
        for layer in sorted(self.states):
            for held in (self.states[layer].convolution, self.states[layer].recurrent):
                yield from (held[number] for number in sorted(held))

    def describe(self) -> dict[str, Any]:
        """What has to be known of the tensors to make them again, as JSON."""
        return {
            "capacity": self.capacity,
            "layers": {layer: _form(tensors[0][0, 0]) for layer, tensors in self.layers.items()},
            "states": {
                layer: [{number: _form(tensor) for number, tensor in held.items()} for held in _parts(states)]
                for layer, states in self.states.items()
            },
        }

    def restore(self, described: dict[str, Any], device: torch.device) -> None:
        """Make the tensors that `describe` has described, with zeros in them."""
        self.capacity = described["capacity"]
        for layer, form in described["layers"].items():
            like = _made(form, device)[None]
            self.layers[int(layer)] = (self._empty(like), self._empty(like))
        for layer, parts in described["states"].items():
            states = self.states.setdefault(int(layer), States())
            for held, forms in zip(_parts(states), parts, strict=True):
                held.update({int(number): _made(form, device) for number, form in forms.items()})

    def _empty(self, like: Tensor) -> Tensor:
        # Zeros: what is masked is multiplied by zero, which memory that holds NaN would survive.
        shape = (self.rows, self.capacity, *like.shape[1:])
        if not self._on_host:
            return like.new_zeros(shape)
        # Page-locked: they go to the GPU in every step.
        memory = pages(math.prod(shape) * like.dtype.itemsize, pin=torch.cuda.is_available())
        return torch.frombuffer(memory, dtype=like.dtype).view(shape)

    def _grown(self, tensor: Tensor) -> Tensor:
        grown = self._empty(tensor[0])
        grown[:, : tensor.shape[1]] = tensor
        return grown


def _copied(held: Tensor, lengths: Sequence[int], device: torch.device) -> Tensor:
    """A copy on a device, row by row: what lies behind a row's tokens is not moved."""
    made = held.new_zeros(held.shape, device=device)
    for row, length in enumerate(lengths):
        made[row, :length].copy_(held[row, :length], non_blocking=True)
    return made


def _parts(states: States) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    return states.convolution, states.recurrent


def _form(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), *tensor.shape]


def _made(form: list[Any], device: torch.device) -> Tensor:
    return torch.zeros(form[1:], dtype=getattr(torch, form[0]), device=device)
