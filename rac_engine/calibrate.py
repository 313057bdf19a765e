"""The way of the calibration tokens through a layer, and what is gathered from them.

All tokens of all sequences lie behind one another in one tensor [tokens, hidden] in host memory; between layers nothing
else is kept. Sequences do not see each other and there are no pads. A block is gone through chunk by chunk, always the
same chunks, so that the same weights give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rac_engine.models import Block, Chunk, Model
from rac_engine.traces import Calibration
from rac_kernels import column_norm_accumulate_, hessian_accumulate_

KEEP_BYTES = 1 << 30  # what a block's inner activations may take, to spare computing them again


class Statistic:
    """What a solver wants to know about the input of a stage: H = Σ w x xᵀ, or its diagonal only.

    `value` is fp32, [columns, columns] (upper triangle) or [columns].
    """

    def __init__(self, columns: int, full: bool, device: str) -> None:
        self.value = torch.zeros((columns, columns) if full else columns, dtype=torch.float32, device=device)
        self._accumulate = hessian_accumulate_ if full else column_norm_accumulate_

    def add(self, x: Tensor, weights: Tensor | None) -> None:
        """Count tokens x [tokens, columns], with weights [tokens] fp32 or 1 each."""
        if weights is not None:
            counted = weights > 0
            x, weights = x[counted], weights[counted]
            weights = None if bool((weights == 1).all()) else weights
        if len(x):
            self._accumulate(self.value, x, weights)


@dataclass
class Packing:
    """Calibration sequences behind one another, longest first.

    Sorted so that sequences of equal length make one batch in attention and memory is at its peak at the start.
    """

    token_ids: Tensor
    """[tokens] int64"""
    weights: Tensor | None
    """[tokens] fp32: how much a token counts; None: 1 each."""
    chunks: list[Chunk]
    counted: int
    """Tokens that count."""

    @classmethod
    def of(cls, calibration: Calibration, chunk_tokens: int) -> Packing:
        """Pack whole sequences into chunks of at most `chunk_tokens`, or of one sequence that is longer."""
        sequences = sorted((s for s in calibration.sequences if len(s.token_ids)), key=lambda s: -len(s.token_ids))
        chunks: list[Chunk] = []
        start, lengths = 0, list[int]()
        for length in [len(sequence.token_ids) for sequence in sequences] + [0]:
            size = sum(lengths)
            if lengths and (not length or size + length > chunk_tokens):
                chunks.append(Chunk(start, start + size, tuple(lengths), chunk_tokens))
                start, lengths = start + size, []
            lengths.append(length)
        ids = [np.asarray(sequence.token_ids, dtype=np.int64) for sequence in sequences]
        weights = [
            np.ones(len(sequence.token_ids), np.float32) if sequence.weights is None else sequence.weights
            for sequence in sequences
        ]
        packed = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *weights]).astype(np.float32))
        return cls(
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *ids])),
            None if bool((packed == 1).all()) else packed,
            chunks,
            int((packed > 0).sum()),
        )


class Stream:
    """The hidden states of all calibration tokens, on their way from layer to layer."""

    def __init__(self, model: Model, packing: Packing, dtype: torch.dtype, device: str) -> None:
        self.packing, self.device = packing, device
        self.hidden = model.embed(packing.token_ids, dtype)
        """[tokens, hidden]"""

    def observe_inputs(self, block: Block, statistic: Statistic) -> None:
        """Gather `statistic` from the input of the block's first matrices."""
        for chunk in self.packing.chunks:
            hidden = self._load(chunk)
            for piece in chunk.pieces():
                statistic.add(block.norm(hidden[piece]), self._weights(chunk, piece))

    def observe_inner(self, block: Block, statistic: Statistic) -> Tensor | None:
        """Gather `statistic` from the input [tokens, block.width] of the block's last matrix.

        Returns that input for `advance`, unless it is too large to be kept.
        """
        tokens = len(self.hidden)
        fits = tokens * block.width * self.hidden.dtype.itemsize <= KEEP_BYTES
        kept = self.hidden.new_empty(tokens, block.width) if fits or block.plan.attention else None
        for chunk in self.packing.chunks:
            hidden = self._load(chunk)
            for piece in block.slices(chunk):
                inner = block.inner(block.norm(hidden[piece]), chunk)
                statistic.add(inner, self._weights(chunk, piece))
                if kept is not None:
                    kept[chunk.start :][piece] = inner
        return kept

    def advance(self, block: Block, kept: Tensor | None = None) -> None:
        """Go through the block, with its inner activations computed again unless they were `kept`."""
        for chunk in self.packing.chunks:
            hidden = self._load(chunk)
            for piece in block.slices(chunk):
                if kept is None:
                    inner = block.inner(block.norm(hidden[piece]), chunk)
                else:
                    inner = kept[chunk.start :][piece].to(self.device)
                self.hidden[chunk.start :][piece] = block.leave(hidden[piece], inner)

    def observe_layer(self, blocks: list[Block], statistics: Mapping[int, Statistic]) -> None:
        """Gather the statistics of all stages in one pass through the layer as it is, which moves no token on."""
        for chunk in self.packing.chunks:
            hidden = self._load(chunk)
            for number, block in enumerate(blocks):
                after = torch.empty_like(hidden)
                for piece in block.slices(chunk):
                    x = block.norm(hidden[piece])
                    inner = block.inner(x, chunk)
                    for stage, seen in ((2 * number, x), (2 * number + 1, inner)):
                        if stage in statistics:
                            statistics[stage].add(seen, self._weights(chunk, piece))
                    after[piece] = block.leave(hidden[piece], inner)
                hidden = after

    def _load(self, chunk: Chunk) -> Tensor:
        return self.hidden[chunk.start : chunk.stop].to(self.device)

    def _weights(self, chunk: Chunk, piece: slice) -> Tensor | None:
        weights = self.packing.weights
        return None if weights is None else weights[chunk.start :][piece].to(self.device)
