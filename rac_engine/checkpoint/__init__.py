"""Hugging Face checkpoints as files: read tensor by tensor by their on-disk names, written back in the same layout."""

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
