"""ERNIE 4.5 MoE: q k v and gate up of each expert, norms before the blocks; biases if the config has them.

Shared experts, dense first layers, parts that only predict further tokens.
"""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family(
    "ernie4_5_moe",
    "Ernie4_5_Moe",
    PRE_NORM,
    mixture=MIXTURE,
    renames=(("mlp.gate.moe_statics.", "mlp.moe_statics."),),
    further=("model.mtp_",),
)
