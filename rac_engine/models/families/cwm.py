"""Code World Model: q k v and gate up, norms before the blocks; a sliding window in three of four layers."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("cwm", "Cwm", PRE_NORM)
