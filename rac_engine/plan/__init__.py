"""Plans of pruning jobs: what they touch, take and cost, before anything is read or written."""

from __future__ import annotations

from rac_engine.plan.costs import PROGRAM_BYTES
from rac_engine.plan.forward import plan_forward
from rac_engine.plan.memory import MemoryPlan, plan_memory
from rac_engine.plan.packed import packed_bytes
from rac_engine.plan.phases import Choice, Machine, Tokens
from rac_engine.plan.plan import make_plan
from rac_engine.plan.shapes import Shape, dtype_of
from rac_engine.plan.targets import not_finite, skipped_matrices, target_of
from rac_engine.plan.text import render
from rac_engine.plan.work import device_peaks

__all__ = [
    "PROGRAM_BYTES",
    "Choice",
    "Machine",
    "MemoryPlan",
    "Shape",
    "Tokens",
    "device_peaks",
    "dtype_of",
    "make_plan",
    "not_finite",
    "packed_bytes",
    "plan_forward",
    "plan_memory",
    "render",
    "skipped_matrices",
    "target_of",
]
