"""Hunyuan MoE: q k v and gate up of each expert, norms before the blocks, and on q and k behind the rotary embeddings.

A shared expert; the router is used in fp32.
"""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family, mixture

FAMILY = Family("hunyuan_v1_moe", "HunYuanMoEV1", PRE_NORM, mixture=mixture("shared_mlp"), fp32=("gate.wg.weight",))
