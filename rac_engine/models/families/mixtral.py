"""Mixtral: q k v and w1 w3 of each expert, norms before the blocks; a sliding window."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import MIXTURE, PRE_NORM, ExpertPlan, Family

FAMILY = Family(
    "mixtral",
    "Mixtral",
    PRE_NORM,
    mixture=replace(MIXTURE, experts=ExpertPlan(("w1", "w3"), "w2")),
    renames=(("mlp.", "block_sparse_moe."),),
)
