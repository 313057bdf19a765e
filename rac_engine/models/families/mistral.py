"""Mistral: q k v and gate up, norms before the blocks; a sliding window."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("mistral", "Mistral", PRE_NORM)
