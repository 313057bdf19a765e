"""Decoder layers of each model family, built of transformers' own modules: blocks, matrices, and who shares an input.

Begin at `Model.open(checkpoint)`: `matrices(layer)` lists what can be pruned, `build_layer` makes a layer's `Block`s
from tensors. A block is gone through chunk by chunk (`Chunk`), while `Observer`s see the inputs of its matrices. A
family is a file in `families`, described in the words of `plans`; what layers share without weights is in
`architecture`, what is refused of a config.json in `configs`.
"""

from __future__ import annotations

from rac_engine.models.attention import scoring_of
from rac_engine.models.block import Block
from rac_engine.models.chunk import Chunk
from rac_engine.models.configs import loading_config
from rac_engine.models.dtypes import working_dtype
from rac_engine.models.matrices import EMBEDDINGS, Matrix
from rac_engine.models.model import Model
from rac_engine.models.observers import Observer
from rac_engine.models.readout import LOGIT_ROWS
from rac_engine.models.recurrent import CALL_TOKENS, States, Workspace, run_on, run_packed, workspace

__all__ = [
    "CALL_TOKENS",
    "EMBEDDINGS",
    "LOGIT_ROWS",
    "Block",
    "Chunk",
    "Matrix",
    "Model",
    "Observer",
    "States",
    "Workspace",
    "loading_config",
    "run_on",
    "run_packed",
    "scoring_of",
    "working_dtype",
    "workspace",
]
