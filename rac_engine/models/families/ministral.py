"""Ministral: q k v and gate up, norms before the blocks; a sliding window on some layers."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("ministral", "Ministral", PRE_NORM)
