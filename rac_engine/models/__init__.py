"""What a decoder layer is in each model family, on transformers' own modules."""

from __future__ import annotations

from rac_engine.models.attention import scoring_of
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
    "scoring_of",
    "working_dtype",
]
