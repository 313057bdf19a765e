"""The pruning job: load → calibrate → solve → propagate → write, one decoder layer after the other."""

from __future__ import annotations

from rac_engine.engine.card import environment, model_card
from rac_engine.engine.closing import PruneReport
from rac_engine.engine.limits import device_name, limited_gpu, machine_limits, require_memory
from rac_engine.engine.masks import MaskReport, apply_masks
from rac_engine.engine.metrics import Metrics, layer_of, load_metrics, place_of, source_name
from rac_engine.engine.pruning import prune
from rac_engine.engine.setup import arranged_of, calibration_of
from rac_engine.engine.verify import verify
from rac_engine.engine.zeros import KeptZeros, keep_zeros

__all__ = [
    "KeptZeros",
    "MaskReport",
    "Metrics",
    "PruneReport",
    "apply_masks",
    "arranged_of",
    "calibration_of",
    "device_name",
    "environment",
    "keep_zeros",
    "layer_of",
    "limited_gpu",
    "load_metrics",
    "machine_limits",
    "model_card",
    "place_of",
    "prune",
    "require_memory",
    "source_name",
    "verify",
]
