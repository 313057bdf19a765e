"""The way of the calibration tokens through a layer, and what is gathered from them.

All tokens of all sequences lie behind one another in one matrix [tokens, hidden] (see activations); between layers
nothing else is kept. Sequences do not see each other and there are no pads. A block is gone through chunk by chunk,
always the same chunks, so that the same weights give the same bytes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rac_engine.calibrate.activations import Activations, Place
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.statistics import DenseOutputs, Statistic
from rac_engine.jobs.timeline import Timeline
from rac_engine.models import Block, Chunk, Model, Observer

KEEP_BYTES = 1 << 30  # what a block's inner activations may take, to spare computing them again


class Stream:
    """The hidden states of all calibration tokens, on their way from layer to layer.

    They live in `place` (see `Activations.make`), and so does a block's inner activation where it is kept.
    """

    def __init__(
        self,
        model: Model,
        packing: Packing,
        dtype: torch.dtype,
        device: str,
        place: Place = "host",
        folder: Path | None = None,
        keep_bytes: int = KEEP_BYTES,
        timeline: Timeline | None = None,
        table: Tensor | None = None,
    ) -> None:
        """`table` are the embeddings, if they are not the checkpoint's own."""
        self.packing, self.dtype, self.device = packing, dtype, device
        self._place, self._folder, self._keep_bytes, self._timeline = place, folder, keep_bytes, timeline
        self._spans = [(chunk.start, chunk.stop) for chunk in packing.chunks]
        self._move: tuple[Block, Activations | None] | None = None
        """The block that the tokens are still to go through, and its inner activations if they were kept."""
        self.hidden = self._room(model.hidden_size)
        """[tokens, hidden]"""
        table = model.embedding() if table is None else table
        for start, stop in self._spans:
            self.hidden.write(start, model.embed(packing.token_ids[start:stop], dtype, table).to(device))

    def observe(self, block: Block, statistics: Mapping[str, Statistic], keep: bool = True) -> Activations | None:
        """Gather `statistics` from inputs of the block's matrices, by the inputs' names, no further than needed.

        If the input [tokens, block.width] of the block's last matrix is among them, returns it for `advance`, unless it
        is too large or not to be kept: where the tokens go no further, or the block will be another by then.
        """
        kept = self._room_for(block) if keep and block.last in statistics else None
        for chunk, hidden in self._chunks():
            x, observers = block.norm(hidden), self._observers(statistics, chunk)
            if kept is None:
                block.observe(x, chunk, observers)
            else:
                kept.write(chunk.start, block.inner(x, chunk, observers))
        if kept is not None:
            kept.prepare(self._spans)
        return kept

    def observe_matched(
        self,
        block: Block,
        statistics: Mapping[str, Statistic],
        beside: DenseReference,
        residual: bool,
        keep: bool = True,
        further: bool = True,
    ) -> Activations | None:
        """As `observe`, and gather what ties the inputs to those that the dense model beside has.

        The outputs wanted of the last matrix are the dense model's, or with `residual` those that would also bring the
        hidden states to the dense model's. When that matrix is among them, the dense model's states move on through the
        block, unless the tokens go no `further`. Experts' inputs are not for this (see `observe_experts`).
        """
        kept = self._room_for(block) if keep and block.last in statistics else None
        for (chunk, hidden), (_, original) in zip(self._chunks(), beside.stream._chunks(), strict=True):
            weights = self._weights(chunk)
            given, dense = dict[str, Tensor](), dict[str, Tensor]()
            observers = _recorders(given, [*statistics])
            x, theirs = block.norm(hidden), beside.block.norm(original)
            if kept is None:
                block.observe(x, chunk, observers)
            else:
                kept.write(chunk.start, block.inner(x, chunk, observers))
            between = _recorders(dense, [name for name in statistics if name != block.last])
            others = dict[str, list[Tensor]]()
            if block.last is not None and block.last in statistics:
                output = beside.block.output(beside.block.inner(theirs, chunk, between))
                own = output if beside.block.bias is None else output - beside.block.bias
                drift = block.output_gap(original, hidden) if residual else None
                others[block.last] = [own if drift is None else own + drift, own]
                if further:
                    beside.stream.hidden.write(chunk.start, beside.block.add(original, output))
            else:
                beside.block.observe(theirs, chunk, between)
            others |= {name: [x] for name, x in dense.items()}
            for name, statistic in statistics.items():
                statistic.add_matched(given[name], others[name], weights)
        if kept is not None:
            kept.prepare(self._spans)
        return kept

    def observe_experts(self, block: Block, statistics: Mapping[str, Statistic], beside: DenseReference) -> None:
        """As `observe` for inputs of a mixture, and gather what ties them to those that the dense model beside has.

        The tokens of an expert are those that the pruned model's router sends to it, in both models.
        """
        for (chunk, hidden), (_, original) in zip(self._chunks(), beside.stream._chunks(), strict=True):
            observers = self._matched_observers(statistics, chunk, beside.block, beside.block.norm(original))
            block.observe(block.norm(hidden), chunk, observers)

    def observe_sample(
        self,
        block: Block,
        experts: Mapping[str, tuple[Statistic, float]],
        count: int,
        beside: DenseReference | None = None,
    ) -> None:
        """Add tokens of the whole layer to statistics of experts' inputs, by their names, as if all were routed there.

        The tokens are `count` of those that count, evenly spaced, the same for all `experts`; each expert's weight (a
        token's own aside) goes to the sum of them all. `beside` is the dense model to which the inputs are tied.
        """
        weights = self.packing.weights
        counted = torch.arange(len(self.hidden)) if weights is None else weights.nonzero()[:, 0]
        count = min(count, len(counted))
        chosen = counted[torch.arange(count) * len(counted) // max(count, 1)]
        every = float(count if weights is None else weights[chosen].sum(dtype=torch.float64))
        originals = itertools.repeat(None) if beside is None else (hidden for _, hidden in beside.stream._chunks())
        for (chunk, hidden), original in zip(self._chunks(), originals, strict=False):
            here = chosen[(chosen >= chunk.start) & (chosen < chunk.stop)]
            if not len(here):
                continue
            places = (here - chunk.start).to(self.device)
            x = block.norm(hidden[places])
            theirs = None if beside is None or original is None else beside.block.norm(original[places])
            own = torch.ones(len(here)) if weights is None else weights[here]
            for name, (statistic, weight) in experts.items():
                scaled = (own * (weight / every)).to(self.device)
                given = block.expert_input(name, x)
                if beside is None or theirs is None:
                    statistic.add(given, scaled)
                else:
                    statistic.add_matched(given, _of_expert(statistic, beside.block, name, theirs), scaled)

    def advance(self, block: Block, kept: Activations | None = None) -> None:
        """Go through the block, with its inner activations computed again unless they were `kept` (and end there)."""
        self.advance_later(block, kept)
        self.flush()

    def advance_later(self, block: Block, kept: Activations | None = None) -> None:
        """As `advance`, on the way of the next pass over the tokens: they are fetched once for both.

        Until then the block and what was kept of it are in memory.
        """
        self.flush()
        self._move = block, kept

    def flush(self) -> None:
        """Let the tokens go through the block that they are still to go through, if there is one."""
        if self._move is not None:
            for _ in self._chunks():
                pass

    def observe_layer(self, blocks: list[Block], statistics: Mapping[str, Statistic]) -> None:
        """Gather statistics of all of a layer's inputs in one pass through it as it is, which moves no token on."""
        *others, last = blocks
        own = {group.input for group in last.groups}
        for chunk, hidden in self._chunks():
            observers = self._observers(statistics, chunk)
            for block in others:
                hidden = block.finish(hidden, block.inner(block.norm(hidden), chunk, observers))
            last.observe(last.norm(hidden), chunk, {name: tap for name, tap in observers.items() if name in own})

    def close(self) -> None:
        """Let go of the hidden states."""
        self.hidden.close()

    def _room_for(self, block: Block) -> Activations | None:
        """Where a block's inner activations are kept, unless they are too large."""
        fits = len(self.hidden) * block.width * self.dtype.itemsize <= self._keep_bytes
        return self._room(block.width) if fits or block.plan.attention else None

    def _room(self, width: int) -> Activations:
        tokens = len(self.packing.token_ids)
        return Activations.make(tokens, width, self.dtype, self.device, self._place, self._folder, self._timeline)

    def _chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Every chunk with its hidden states [chunk, hidden] on the device, moved on by what was put off till now."""
        move, self._move = self._move, None
        chunks = zip(self.packing.chunks, self.hidden.each(self._spans), strict=True)
        if move is None:
            yield from chunks
            return
        block, kept = move
        before = None if kept is None else kept.each(self._spans)
        for chunk, hidden in chunks:
            inner = block.inner(block.norm(hidden), chunk) if before is None else next(before)
            hidden = block.finish(hidden, inner)
            self.hidden.write(chunk.start, hidden)
            del inner
            yield chunk, hidden
        if kept is not None:
            kept.close()

    def _observers(self, statistics: Mapping[str, Statistic], chunk: Chunk) -> dict[str, Observer]:
        """The statistics as what is shown inputs on the way through a block."""
        weights = self._weights(chunk)

        def add(statistic: Statistic, x: Tensor, tokens: Tensor | None) -> None:
            statistic.add(x, weights if weights is None or tokens is None else weights[tokens])

        return {name: functools.partial(add, statistic) for name, statistic in statistics.items()}

    def _matched_observers(
        self, statistics: Mapping[str, Statistic], chunk: Chunk, dense: Block, theirs: Tensor
    ) -> dict[str, Observer]:
        """As `_observers` for a mixture, beside its `dense` block, whose input is `theirs` [chunk, hidden].

        What all tokens are given in it is made first, what an expert would be given of some when these are seen.
        """
        weights, of_all = self._weights(chunk), dict[str, Tensor]()
        dense.observe(theirs, chunk, _recorders(of_all, [name for name in statistics if not dense.is_routed(name)]))

        def add(name: str, given: Tensor, tokens: Tensor | None) -> None:
            if tokens is None:
                statistics[name].add_matched(given, [of_all.pop(name)], weights)
            else:
                own = None if weights is None else weights[tokens]
                statistics[name].add_matched(given, _of_expert(statistics[name], dense, name, theirs[tokens]), own)

        return {name: functools.partial(add, name) for name in statistics}

    def _weights(self, chunk: Chunk) -> Tensor | None:
        weights = self.packing.weights
        return None if weights is None else weights[chunk.start : chunk.stop].to(self.device)


@dataclass(frozen=True)
class DenseReference:
    """The dense model at the same place: its hidden states, and the block with its own weights."""

    stream: Stream
    block: Block


def _of_expert(statistic: Statistic, dense: Block, name: str, x: Tensor) -> list[Tensor]:
    """What an input of an expert of the `dense` block is tied to, if the tokens x [tokens, hidden] come there."""
    inner = dense.expert_input(name, x)
    return [dense.expert_output(name, inner)] * 2 if isinstance(statistic.match, DenseOutputs) else [inner]


def _recorders(place: dict[str, Tensor], names: list[str]) -> dict[str, Observer]:
    """Taps that put the inputs they are shown, of all tokens of a chunk, into `place`."""

    def keep(name: str, x: Tensor, _: Tensor | None) -> None:
        place[name] = x

    return {name: functools.partial(keep, name) for name in names}
