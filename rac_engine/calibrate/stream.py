"""The hidden states of the calibration tokens, moved through a layer block by block while statistics are gathered.

All tokens of all sequences lie behind one another in one matrix [tokens, hidden] (see `Activations`); between layers
nothing else is kept. Sequences do not see each other and there are no pads. A block is gone through chunk by chunk,
always the same chunks, so that the same weights give the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_engine.calibrate.activations import IN_MEMORY, Activations, Storage
from rac_engine.calibrate.drift import Drift
from rac_engine.calibrate.observers import counting, expert_match, matching, recording
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.statistics import Statistic
from rac_engine.models import Block, Chunk, Model, Observer

KEEP_BYTES = 1 << 30  # what a block's inner activations may take, to spare computing them again


def keeps_inner(attention: bool, tokens: int, width: int, dtype_bytes: int, keep_bytes: int) -> bool:
    """Whether a block's inner activations [tokens, width] are kept, not computed twice: attention's always are."""
    return attention or tokens * width * dtype_bytes <= keep_bytes


class Stream:
    """The hidden states of all calibration tokens, moved from layer to layer.

    They live in `storage`, and so do a block's inner activations where these are kept, which take `keep_bytes` at most
    except behind an attention.
    """

    def __init__(
        self,
        model: Model,
        packing: Packing,
        dtype: torch.dtype,
        storage: Storage = IN_MEMORY,
        keep_bytes: int = KEEP_BYTES,
        table: Tensor | None = None,
    ) -> None:
        """Embed the tokens of `packing`; `table` are the embeddings, if they are not the checkpoint's own."""
        self.packing, self.dtype, self.device = packing, dtype, storage.device
        self._storage, self._keep_bytes = storage, keep_bytes
        self._spans = [(chunk.start, chunk.stop) for chunk in packing.chunks]
        self._move: tuple[Block, Activations | None] | None = None
        """The block that the tokens are still to go through, and its inner activations if they were kept."""
        self.hidden = self._make_activations(model.hidden_size)
        """[tokens, hidden]"""
        table = model.embedding() if table is None else table
        for start, stop in self._spans:
            self.hidden.write(start, model.embed(packing.token_ids[start:stop], dtype, table).to(self.device))

    def observe(self, block: Block, statistics: Mapping[str, Statistic], keep: bool = True) -> Activations | None:
        """Gather `statistics` from inputs of the block's matrices, by the inputs' names, in one pass over the tokens.

        Tokens that are held out count in `Statistic.held`, where that is, and never in the statistic itself.
        The tokens go no further into the block than needed, and stay before it. If the input [tokens, block.width] of
        the block's last matrix is among them, it is returned for `advance`, unless it is too large or not to `keep`:
        where the tokens go no further, or the block will be another by then.
        """
        kept = self._room_for(block) if keep and block.last in statistics else None
        normed = self._room_for_chunk()
        for chunk, hidden in self.chunks():
            x = block.norm(hidden, normed[: len(hidden)])
            observers = counting(self._own(statistics, chunk), self._weights(chunk))
            if kept is None:
                block.observe(x, chunk, observers)
            else:
                _keep(kept, chunk, block, x, observers)
        if kept is not None:
            kept.prepare(self._spans)
        return kept

    def observe_matched(
        self,
        block: Block,
        statistics: Mapping[str, Statistic],
        reference: DenseReference,
        residual: bool,
        keep: bool = True,
        further: bool = True,
        drift: Drift | None = None,
    ) -> Activations | None:
        """Like `observe`, and match each input with the one that the dense model has there (`Statistic.match`).

        The outputs wanted of the last matrix are the dense model's, or with `residual` those that would also bring the
        hidden states to the dense model's. When that matrix is among them, the dense model's states move on through the
        block, unless the tokens go no `further`. Experts' inputs are not for this (see `observe_experts`). With `drift`
        the states before the block are compared on the way.
        """
        kept = self._room_for(block) if keep and block.last in statistics else None
        for (chunk, hidden), (_, original) in zip(self.chunks(), reference.stream.chunks(), strict=True):
            weights = self._weights(chunk)
            if drift is not None:
                drift.add(chunk, hidden, original, weights)
            given, dense = dict[str, Tensor](), dict[str, Tensor]()
            observers = recording(given, [*statistics])
            x, theirs = block.norm(hidden), reference.block.norm(original)
            if kept is None:
                block.observe(x, chunk, observers)
            else:
                _keep(kept, chunk, block, x, observers)
            between = recording(dense, [name for name in statistics if name != block.last])
            others = dict[str, list[Tensor]]()
            if block.last is not None and block.last in statistics:
                output = reference.block.output(reference.block.inner(theirs, chunk, between))
                own = output if reference.block.bias is None else output - reference.block.bias
                gap = block.output_gap(original, hidden) if residual else None
                others[block.last] = [own if gap is None else own + gap, own]
                if further:
                    reference.stream.hidden.write(chunk.start, reference.block.add(original, output))
            else:
                reference.block.observe(theirs, chunk, between)
            others |= {name: [x] for name, x in dense.items()}
            for name, statistic in self._own(statistics, chunk).items():
                statistic.add_matched(given[name], others[name], weights)
        if kept is not None:
            kept.prepare(self._spans)
        return kept

    def observe_experts(
        self, block: Block, statistics: Mapping[str, Statistic], reference: DenseReference, drift: Drift | None = None
    ) -> None:
        """Like `observe_matched` for inputs of a mixture, each matched with the one that the dense model has there.

        The tokens of an expert are those that the pruned model's router sends to it, in both models.
        """
        for (chunk, hidden), (_, original) in zip(self.chunks(), reference.stream.chunks(), strict=True):
            own, theirs = self._own(statistics, chunk), reference.block.norm(original)
            weights = self._weights(chunk)
            if drift is not None:
                drift.add(chunk, hidden, original, weights)
            observers = matching(own, weights, reference.block, theirs, chunk)
            block.observe(block.norm(hidden), chunk, observers)

    def observe_sample(
        self,
        block: Block,
        experts: Mapping[str, tuple[Statistic, float]],
        count: int,
        reference: DenseReference | None = None,
    ) -> None:
        """Add tokens of the whole layer to statistics of experts' inputs, by their names, as if all were routed there.

        The tokens are `count` of those that count, evenly spaced, the same for all `experts`; each expert's weight (a
        token's own aside) goes to the sum of them all. With a `reference` inputs are matched with the dense model's.
        """
        weights, seen = self.packing.weights, self.packing.held_from
        counted = torch.arange(seen) if weights is None else weights[:seen].nonzero()[:, 0]
        count = min(count, len(counted))
        chosen = counted[torch.arange(count) * len(counted) // max(count, 1)]
        every = float(count if weights is None else weights[chosen].sum(dtype=torch.float64))
        originals = itertools.repeat(None) if reference is None else (hidden for _, hidden in reference.stream.chunks())
        for (chunk, hidden), original in zip(self.chunks(), originals, strict=False):
            here = chosen[(chosen >= chunk.start) & (chosen < chunk.stop)]
            if not len(here):
                continue
            places = (here - chunk.start).to(self.device)
            x = block.norm(hidden[places])
            theirs = None if reference is None or original is None else reference.block.norm(original[places])
            own = torch.ones(len(here)) if weights is None else weights[here]
            for name, (statistic, weight) in experts.items():
                scaled = (own * (weight / every)).to(self.device)
                given = block.expert_input(name, x)
                if reference is None or theirs is None:
                    statistic.add(given, scaled)
                else:
                    statistic.add_matched(given, expert_match(statistic, reference.block, name, theirs), scaled)

    def compare(self, other: Stream, drift: Drift) -> None:
        """Compare the states with the dense model's, `other`, in a pass of their own."""
        for (chunk, hidden), (_, original) in zip(self.chunks(), other.chunks(), strict=True):
            drift.add(chunk, hidden, original, self._weights(chunk))

    def advance(self, block: Block, kept: Activations | None = None) -> None:
        """Go through the block, with its inner activations computed again unless they were `kept` (and end there)."""
        self.advance_later(block, kept)
        self.flush()

    def advance_later(self, block: Block, kept: Activations | None = None) -> None:
        """Like `advance`, but during the next pass over the tokens, so that they are fetched once for both.

        Until then the block and what was kept of it stay in memory.
        """
        self.flush()
        self._move = block, kept

    def flush(self) -> None:
        """Do at once what `advance_later` has put off, if anything."""
        if self._move is not None:
            for _ in self.chunks():
                pass

    def advance_layer(self, blocks: Sequence[Block]) -> None:
        """Go through all of a layer's blocks in one pass, with nothing gathered and nothing kept."""
        for chunk, hidden in self.chunks():
            for block in blocks:
                hidden = block.finish(hidden, block.inner(block.norm(hidden), chunk))
            self.hidden.write(chunk.start, hidden)

    def observe_layer(self, blocks: list[Block], statistics: Mapping[str, Statistic]) -> None:
        """Gather statistics of all of a layer's inputs in a pass through its `blocks`; the tokens stay before them."""
        *others, last = blocks
        own = {group.input for group in last.groups}
        for chunk, hidden in self.chunks():
            observers = counting(self._own(statistics, chunk), self._weights(chunk))
            for block in others:
                hidden = block.finish(hidden, block.inner(block.norm(hidden), chunk, observers))
            last.observe(last.norm(hidden), chunk, {name: tap for name, tap in observers.items() if name in own})

    def close(self) -> None:
        """Free the hidden states. Nothing can be gathered any more."""
        self.hidden.close()

    def _room_for(self, block: Block) -> Activations | None:
        """Room for a block's inner activations; None if they are too large to be kept."""
        sizes = len(self.hidden), block.width, self.dtype.itemsize
        keep = keeps_inner(block.plan.mixes, *sizes, self._keep_bytes)
        return self._make_activations(block.width) if keep else None

    def _room_for_chunk(self) -> Tensor:
        """Room for the hidden states of any chunk, for one pass: new memory for each costs what it takes to fill it."""
        most = max((chunk.stop - chunk.start for chunk in self.packing.chunks), default=0)
        return torch.empty(most, self.hidden.width, dtype=self.dtype, device=self.device)

    def _make_activations(self, width: int) -> Activations:
        return Activations.make(len(self.packing.token_ids), width, self.dtype, self._storage)

    def chunks(self) -> Iterator[tuple[Chunk, Tensor]]:
        """Every chunk with its hidden states [chunk, hidden] on the device, a pass over all tokens in order.

        What `advance_later` has put off is done on the way.
        """
        move, self._move = self._move, None
        chunks = zip(self.packing.chunks, self.hidden.each(self._spans), strict=True)
        if move is None:
            yield from chunks
            return
        block, kept = move
        before = None if kept is None else kept.each(self._spans)
        for chunk, hidden in chunks:
            inner = block.inner(block.norm(hidden), chunk) if before is None else next(before)
            room = self.hidden.room(chunk.start, chunk.stop)
            hidden = block.finish(hidden, inner, room)
            if room is None:
                self.hidden.write(chunk.start, hidden)
            del inner
            yield chunk, hidden
        if kept is not None:
            kept.close()

    def _own(self, statistics: Mapping[str, Statistic], chunk: Chunk) -> Mapping[str, Statistic]:
        """The statistics in which a chunk's tokens count."""
        if not self.packing.holds_out(chunk):
            return statistics
        return {name: statistic.held for name, statistic in statistics.items() if statistic.held is not None}

    def _weights(self, chunk: Chunk) -> Tensor | None:
        weights = self.packing.weights
        return None if weights is None else weights[chunk.start : chunk.stop].to(self.device)


def _keep(kept: Activations, chunk: Chunk, block: Block, x: Tensor, observers: Mapping[str, Observer]) -> None:
    """Go through a block with its normalised input x [tokens, hidden], and keep its inner activations."""
    room = kept.room(chunk.start, chunk.stop)
    inner = block.inner(x, chunk, observers, room)
    if room is None:
        kept.write(chunk.start, inner)


@dataclass(frozen=True)
class DenseReference:
    """The dense model at the same place as the pruned one: its hidden states, and the block with its own weights."""

    stream: Stream
    block: Block
