"""Qwen 3 MoE: q k v and gate up of each expert, in some layers or all, norms before the blocks and on q and k."""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family("qwen3_moe", "Qwen3Moe", PRE_NORM, mixture=MIXTURE)
