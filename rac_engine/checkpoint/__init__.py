"""Hugging Face checkpoints as files: read tensor by tensor by their on-disk names, written back in the same layout.

Begin at `Checkpoint.open(folder)`, which checks config, index and headers before anything in them is believed, and
`CheckpointWriter(source, folder)`, which writes a checkpoint with the same names, dtypes and shards. Nothing here
knows what a tensor is for. Block-scaled FP8 is read as the bf16 that it stands for.
"""

from __future__ import annotations

from rac_engine.checkpoint.fp8 import fp8_block
from rac_engine.checkpoint.header import TensorInfo, read_config
from rac_engine.checkpoint.reader import INDEX, SINGLE, Checkpoint, other_files
from rac_engine.checkpoint.tensors import bytes_of, is_finite
from rac_engine.checkpoint.writer import CheckpointWriter

__all__ = [
    "INDEX",
    "SINGLE",
    "Checkpoint",
    "CheckpointWriter",
    "TensorInfo",
    "bytes_of",
    "fp8_block",
    "is_finite",
    "other_files",
    "read_config",
]
