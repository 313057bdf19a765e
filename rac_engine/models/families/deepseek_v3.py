"""DeepSeek V3 and R1: q_a kv_a, then q_b and kv_b (latent attention), and gate up of each expert.

Norms before the blocks, shared experts, routing in groups, dense first layers, layers that only predict further tokens.
"""

from __future__ import annotations

from rac_engine.models.plans import LATENT, MIXTURE, PRE_NORM, Family

FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3",
    (LATENT, PRE_NORM[1]),
    mixture=MIXTURE,
    extra_layers="num_nextn_predict_layers",
)
