"""Calibration sequences behind one another, cut into chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rac_engine.models import Chunk
from rac_engine.traces import Calibration

TOKEN_MEMORY = 24  # bytes of a calibration token: its id as it was read and as it is packed, a weight, and a checksum


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

    @property
    def weight(self) -> float:
        """Σ w over the tokens: how many there are where all count 1."""
        return float(self.counted if self.weights is None else self.weights.sum(dtype=torch.float64))

    @classmethod
    def of(cls, calibration: Calibration, chunk_tokens: int) -> Packing:
        """Pack whole sequences into chunks of at most `chunk_tokens`; a longer sequence is a row of chunks."""
        sequences = sorted((s for s in calibration.sequences if len(s.token_ids)), key=lambda s: -len(s.token_ids))
        chunks: list[Chunk] = []
        start, lengths = 0, list[int]()
        for length in [len(sequence.token_ids) for sequence in sequences] + [0]:
            size = sum(lengths)
            if lengths and (not length or size + length > chunk_tokens):
                chunks.append(Chunk(start, start + size, tuple(lengths)))
                start, lengths = start + size, []
            if length <= chunk_tokens:
                lengths.append(length)
                continue
            for offset in range(0, length, chunk_tokens):
                stop = start + min(chunk_tokens, length - offset)
                chunks.append(Chunk(start, stop, (length,), offset))
                start = stop
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
