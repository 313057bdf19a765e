"""Calibration sequences behind one another, cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rac_engine.models import Chunk
from rac_engine.traces import Calibration, TokenSequence

TOKEN_MEMORY = 26  # bytes of a calibration token: its id as it was read and as packed, weight, checksum, source, part


@dataclass
class Packing:
    """Calibration sequences behind one another, longest first, those that are held out behind all others.

    Sorted so that sequences of equal length make one batch in attention and memory is at its peak at the start.
    """

    token_ids: Tensor
    """[tokens] int64"""
    weights: Tensor | None
    """[tokens] fp32: how much a token counts; None: 1 each."""
    chunks: list[Chunk]
    """No chunk has tokens that are held out beside others."""
    counted: int
    """Tokens that count and are not held out."""
    held_from: int
    """The first token that is held out; the number of tokens where none is."""
    held_counted: int
    """Tokens that count and are held out."""
    sources: Tensor | None
    """[tokens] uint8: the number of a token's source; None: all are of one."""
    completions: Tensor
    """[tokens] bool: whether a token is a completion's, or of text."""

    @property
    def weight(self) -> float:
        """Σ w over the tokens that are not held out: how many there are where all count 1."""
        return float(self.counted if self.weights is None else self.weights[: self.held_from].sum(dtype=torch.float64))

    def holds_out(self, chunk: Chunk) -> bool:
        """Whether a chunk's tokens are held out."""
        return chunk.start >= self.held_from

    @classmethod
    def of(cls, calibration: Calibration, chunk_tokens: int) -> Packing:
        """Pack whole sequences into chunks of at most `chunk_tokens`; a longer sequence is a row of chunks."""
        every = [sequence for sequence in calibration.sequences if len(sequence.token_ids)]
        sequences = sorted(every, key=lambda sequence: (sequence.held_out, -len(sequence.token_ids)))
        lengths = [len(sequence.token_ids) for sequence in sequences]
        seen = sum(not sequence.held_out for sequence in sequences)
        held_from = sum(lengths[:seen])
        chunks = _chunks(lengths[:seen], chunk_tokens, 0) + _chunks(lengths[seen:], chunk_tokens, held_from)
        ids = [np.asarray(sequence.token_ids, dtype=np.int64) for sequence in sequences]
        weights = [
            np.ones(len(sequence.token_ids), np.float32) if sequence.weights is None else sequence.weights
            for sequence in sequences
        ]
        packed = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *weights]).astype(np.float32))
        origins = np.repeat(np.array([sequence.source for sequence in sequences], np.uint8), lengths)
        return cls(
            torch.from_numpy(np.concatenate([np.empty(0, np.int64), *ids])),
            None if bool((packed == 1).all()) else packed,
            chunks,
            int((packed[:held_from] > 0).sum()),
            held_from,
            int((packed[held_from:] > 0).sum()),
            torch.from_numpy(origins) if origins.any() else None,
            torch.from_numpy(np.concatenate([np.empty(0, bool), *map(_is_completion, sequences)])),
        )


def _is_completion(sequence: TokenSequence) -> np.ndarray:
    """[tokens] bool: which of a sequence's tokens are behind its prompt."""
    return np.arange(len(sequence.token_ids)) >= sequence.prompt_length


def _chunks(lengths: list[int], chunk_tokens: int, start: int) -> list[Chunk]:
    """Chunks of sequences of those lengths, the first of which begins at token `start`."""
    chunks, together = list[Chunk](), list[int]()
    for length in [*lengths, 0]:
        size = sum(together)
        if together and (not length or size + length > chunk_tokens):
            chunks.append(Chunk(start, start + size, tuple(together)))
            start, together = start + size, []
        if length <= chunk_tokens:
            together.append(length)
            continue
        for offset in range(0, length, chunk_tokens):
            stop = start + min(chunk_tokens, length - offset)
            chunks.append(Chunk(start, stop, (length,), offset))
            start = stop
    return chunks
