"""What a decoder layer is in each model family, on transformers' own modules."""

from __future__ import annotations

from rac_engine.models.attention import attend_in_the_open, attention_bytes, is_fused, packed_attention
from rac_engine.models.block import Block
from rac_engine.models.dtypes import working_dtype
from rac_engine.models.matrices import EMBEDDINGS, Matrix
from rac_engine.models.model import Model
from rac_engine.models.taps import Chunk, Tap

__all__ = [
    "EMBEDDINGS",
    "Block",
    "Chunk",
    "Matrix",
    "Model",
    "Tap",
    "attend_in_the_open",
    "attention_bytes",
    "is_fused",
    "packed_attention",
    "working_dtype",
]
