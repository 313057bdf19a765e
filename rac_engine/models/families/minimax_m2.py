"""MiniMax M2: q k v and w1 w3 of each expert, norms before the blocks and on q and k over all heads.

Partial rotary embeddings; the router and the bias that corrects its choice are used in fp32, as they are published.
"""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import MIXTURE, PRE_NORM, ExpertPlan, Family

FAMILY = Family(
    "minimax_m2",
    "MiniMaxM2",
    PRE_NORM,
    mixture=replace(MIXTURE, experts=ExpertPlan(("w1", "w3"), "w2")),
    renames=(("mlp.", "block_sparse_moe."),),
    fp32=("gate.weight", "e_score_correction_bias"),
)
