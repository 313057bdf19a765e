"""LFM 2: q k v or the entrance of a short convolution, and w1 w3; norms before the blocks and on q and k."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, BlockPlan, Family

FAMILY = Family(
    "lfm2",
    "Lfm2",
    (
        BlockPlan("conv", "operator_norm", ("in_proj",), "out_proj", recurrent=True),
        BlockPlan("self_attn", "operator_norm", PRE_NORM[0].inputs, "out_proj", attention=True),
        BlockPlan("feed_forward", "ffn_norm", ("w1", "w3"), "w2"),
    ),
    norm="model.embedding_norm.weight",
)
