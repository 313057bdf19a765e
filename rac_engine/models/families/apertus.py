"""Apertus: q k v and up, norms before the blocks and on q and k; an activation with weights of its own."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import PRE_NORM, UP_DOWN, Family

FAMILY = Family(
    "apertus",
    "Apertus",
    (replace(PRE_NORM[0], norm="attention_layernorm"), replace(UP_DOWN, norm="feedforward_layernorm")),
)
