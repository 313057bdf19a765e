"""Calibration: the tokens' hidden states, moved through a model layer by layer, and the statistics gathered on the way.

Begin at `Stream`: `Packing` puts the sequences into chunks, `Storage` says where the activations live, and a stream
shows a block's inputs to a `Statistic` each (a Hessian, and with `DenseInputs` or `DenseOutputs` what matches the
pruned model with the dense one) before it moves the tokens on. `tune` moves a pruned block's weights together.
"""

from __future__ import annotations

from rac_engine.calibrate.activations import AHEAD, Activations, Place, Storage
from rac_engine.calibrate.packing import Packing
from rac_engine.calibrate.statistics import DenseInputs, DenseOutputs, Statistic
from rac_engine.calibrate.stream import KEEP_BYTES, DenseReference, Stream
from rac_engine.calibrate.tuning import BATCH, STEPS, tune

__all__ = [
    "AHEAD",
    "BATCH",
    "KEEP_BYTES",
    "STEPS",
    "Activations",
    "DenseInputs",
    "DenseOutputs",
    "DenseReference",
    "Packing",
    "Place",
    "Statistic",
    "Storage",
    "Stream",
    "tune",
]
