"""Bamba: the entrance of a state-space model (Mamba 2) or q k v, and gate up; norms before the blocks."""

from __future__ import annotations

from rac_engine.models.plans import MAMBA, PRE_NORM, BlockPlan, Family

FAMILY = Family(
    "bamba",
    "Bamba",
    (MAMBA, PRE_NORM[0], BlockPlan("feed_forward", "pre_ff_layernorm", PRE_NORM[1].inputs, "down_proj")),
    norm="model.final_layernorm.weight",
)
