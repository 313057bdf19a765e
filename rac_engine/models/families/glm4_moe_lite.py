"""GLM-4.7 Flash: q_a kv_a, then q_b and kv_b (latent attention), and gate up of each expert, norms before the blocks.

Shared experts, routing in groups, dense first layers, a layer that only predicts further tokens.
"""

from __future__ import annotations

from rac_engine.models.plans import LATENT, MIXTURE, PRE_NORM, Family

FAMILY = Family(
    "glm4_moe_lite",
    "Glm4MoeLite",
    (LATENT, PRE_NORM[1]),
    mixture=MIXTURE,
    extra_layers="num_nextn_predict_layers",
)
