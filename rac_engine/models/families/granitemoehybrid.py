"""Granite 4: the entrance of a state-space model (Mamba 2) or q k v, and gate_up of an MLP and of experts beside it.

Norms before the blocks; multipliers on embeddings, attention and residuals; attention without positions in most.
"""

from __future__ import annotations

from rac_engine.models.plans import MAMBA, PRE_NORM, BlockPlan, ExpertPlan, Family

_MLP = BlockPlan("shared_mlp", "post_attention_layernorm", ("input_linear",), "output_linear")

FAMILY = Family(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    (
        MAMBA,
        PRE_NORM[0],
        _MLP,
    ),
    mixture=BlockPlan(
        "block_sparse_moe",
        "post_attention_layernorm",
        (),
        "",
        beside=_MLP,
        experts=ExpertPlan(("gate_up_proj",), "down_proj", stacked=True),
    ),
    renames=(
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
        ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
        ("block_sparse_moe.router.", "block_sparse_moe.router.layer."),
    ),
    embedding_scale=lambda config, dtype: config.embedding_multiplier,
    residual_scale=lambda config: config.residual_multiplier,
    has_positions=lambda config: config.position_embedding_type == "rope",
)
