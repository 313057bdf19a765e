"""The way of the calibration tokens through a layer, and what is gathered from them."""

from __future__ import annotations

from rac_engine.calibrate.activations import AHEAD, Activations, Place
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
    "Stream",
    "tune",
]
