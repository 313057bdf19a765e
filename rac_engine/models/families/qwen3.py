"""Qwen 3: q k v and gate up, norms before the blocks and on q and k."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("qwen3", "Qwen3", PRE_NORM)
