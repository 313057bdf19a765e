"""Ministral 3: q k v and gate up, norms before the blocks; queries that grow with their position."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("ministral3", "Ministral3", PRE_NORM)
