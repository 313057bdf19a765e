"""K-EXAONE: q k v and gate up of each expert, norms before the blocks and on q and k.

A sliding window in three of four layers and no rotary embeddings in the others, shared experts, routing in groups,
dense first layers, parts that only predict further tokens.
"""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family(
    "exaone_moe",
    "ExaoneMoe",
    PRE_NORM,
    mixture=MIXTURE,
    renames=(("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),),
    further=("mtp.",),
)
