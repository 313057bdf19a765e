"""Calibration: the tokens' hidden states, moved through a model layer by layer, and the statistics gathered on the way.

Begin at `Stream`: `Packing` puts the sequences into chunks, `Storage` says where the activations live, and a stream
shows a block's inputs to a `Statistic` each (a Hessian, and with `DenseInputs` or `DenseOutputs` what matches the
pruned model with the dense one) before it moves the tokens on. `tune` moves a pruned block's weights
together, and `Lessons` those of the whole model.
"""

from __future__ import annotations

from rac_engine.calibrate.activations import Activations, Place, Storage, storing_bytes
from rac_engine.calibrate.drift import Drift
from rac_engine.calibrate.packing import TOKEN_MEMORY, Packing
from rac_engine.calibrate.recovery import (
    PIECE,
    TARGET_BYTES,
    Lessons,
    Step,
    batch_tokens,
    learning_bytes,
    learning_files,
    next_token_weights,
)
from rac_engine.calibrate.statistics import DenseInputs, DenseOutputs, Statistic, match_bytes, statistic_bytes
from rac_engine.calibrate.stream import KEEP_BYTES, DenseReference, Stream, keeps_inner
from rac_engine.calibrate.tuning import attention_inner, step_tokens, tune
from rac_engine.calibrate.tuning import workspace as tuning_bytes

__all__ = [
    "KEEP_BYTES",
    "PIECE",
    "TARGET_BYTES",
    "TOKEN_MEMORY",
    "Activations",
    "DenseInputs",
    "DenseOutputs",
    "DenseReference",
    "Drift",
    "Lessons",
    "Packing",
    "Place",
    "Statistic",
    "Step",
    "Storage",
    "Stream",
    "attention_inner",
    "batch_tokens",
    "keeps_inner",
    "learning_bytes",
    "learning_files",
    "match_bytes",
    "next_token_weights",
    "statistic_bytes",
    "step_tokens",
    "storing_bytes",
    "tune",
    "tuning_bytes",
]
