"""Granite 4 H and Micro without experts: the entrance of a state-space model (Mamba 2) or q k v, and gate_up.

Norms before the blocks; multipliers on embeddings, attention and residuals; attention without positions in most.
"""

from __future__ import annotations

from typing import Any

from rac_engine.models.plans import MAMBA, PRE_NORM, BlockPlan, Family


def unfit(config: Any) -> str | None:
    """Why a model with experts beside its MLPs is refused."""
    if config.num_local_experts:
        return f"num_local_experts is {config.num_local_experts}; experts beside an MLP of their own are not known"
    return None


FAMILY = Family(
    "granitemoehybrid",
    "GraniteMoeHybrid",
    (
        MAMBA,
        PRE_NORM[0],
        BlockPlan("shared_mlp", "post_attention_layernorm", ("input_linear",), "output_linear"),
    ),
    embedding_scale=lambda config, dtype: config.embedding_multiplier,
    residual_scale=lambda config: config.residual_multiplier,
    has_positions=lambda config: config.position_embedding_type == "rope",
    unfit=unfit,
)
