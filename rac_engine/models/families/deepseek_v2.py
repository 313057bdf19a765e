"""DeepSeek V2: q_a kv_a (q kv_a of V2 Lite), then q_b and kv_b (latent attention), and gate up of each expert.

Norms before the blocks, shared experts, routing in groups, dense first layers.
"""

from __future__ import annotations

from rac_engine.models.plans import LATENT, MIXTURE, PRE_NORM, Family

FAMILY = Family("deepseek_v2", "DeepseekV2", (LATENT, PRE_NORM[1]), mixture=MIXTURE)
