"""MiMo V2 Flash: q k v and gate up of each expert, norms before the blocks.

A sliding window with sinks and twice the keys in most layers, rotary embeddings by layer, a dense first layer, parts
that only predict further tokens.
"""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family(
    "mimo_v2_flash",
    "MiMoV2Flash",
    PRE_NORM,
    mixture=MIXTURE,
    renames=(("self_attn.sinks", "self_attn.attention_sink_bias"),),
    rotary_by_layer_type=True,
    further=("model.mtp.",),
)
