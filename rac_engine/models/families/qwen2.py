"""Qwen 2 and 2.5: q k v and gate up, norms before the blocks; biases on q k v, a sliding window on some layers."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("qwen2", "Qwen2", PRE_NORM)
