"""Hunyuan 3: q k v and gate up of each expert, norms before the blocks and on q and k.

A shared expert, a dense first layer, a layer that only predicts further tokens.
"""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family(
    "hy_v3",
    "HYV3",
    PRE_NORM,
    mixture=MIXTURE,
    renames=(
        ("mlp.gate.weight", "mlp.router.gate.weight"),
        ("mlp.e_score_correction_bias", "mlp.expert_bias"),
        ("mlp.shared_experts.", "mlp.shared_mlp."),
    ),
    extra_layers="num_nextn_predict_layers",
)
