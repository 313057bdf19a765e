"""Seed-OSS: q k v and gate up, norms before the blocks; biases on q k v."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("seed_oss", "SeedOss", PRE_NORM)
