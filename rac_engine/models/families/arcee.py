"""Arcee AFM: q k v and up, norms before the blocks."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, UP_DOWN, Family

FAMILY = Family("arcee", "Arcee", (PRE_NORM[0], UP_DOWN))
