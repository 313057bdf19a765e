"""Hugging Face checkpoints as files: read tensor by tensor by their on-disk names, written back in the same layout.

Begin at `Checkpoint.open(folder)`, which checks config, index and headers before anything in them is believed, and
`CheckpointWriter(source, folder)`, which writes a checkpoint with the same names, dtypes and shards. Nothing here
knows what a tensor is for. Quantized weights are read as the bf16 that they stand for (see `formats`).
"""

from __future__ import annotations

from rac_engine.checkpoint.formats import READ, find_format, unread_format
from rac_engine.checkpoint.header import TensorInfo, file_layout, read_config
from rac_engine.checkpoint.hub import is_fetched, local_folder
from rac_engine.checkpoint.origin import origin_of
from rac_engine.checkpoint.packed import METHOD, VERSION, is_packed
from rac_engine.checkpoint.quantized import without_sections
from rac_engine.checkpoint.reader import INDEX, SINGLE, Checkpoint, inside, other_files
from rac_engine.checkpoint.tensors import bytes_of, is_finite
from rac_engine.checkpoint.writer import CheckpointWriter

__all__ = [
    "INDEX",
    "METHOD",
    "READ",
    "SINGLE",
    "VERSION",
    "Checkpoint",
    "CheckpointWriter",
    "TensorInfo",
    "bytes_of",
    "file_layout",
    "find_format",
    "inside",
    "is_fetched",
    "is_finite",
    "is_packed",
    "local_folder",
    "origin_of",
    "other_files",
    "read_config",
    "unread_format",
    "without_sections",
]
