"""GLM-4-0414 and GLM-Z1: q k v and fused gate_up, norms before and after the blocks; partial rotary embeddings."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import FUSED, PRE_NORM, Family

FAMILY = Family(
    "glm4",
    "Glm4",
    (replace(PRE_NORM[0], after="post_self_attn_layernorm"), replace(FUSED[1], after="post_mlp_layernorm")),
)
