"""Hunyuan: q k v and gate up, norms before the blocks, and on q and k behind the rotary embeddings."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("hunyuan_v1_dense", "HunYuanDenseV1", PRE_NORM)
