"""Gemma 4, the dense language model alone: q k v and gate up, norms before and after the blocks and on q, k and v.

Local and global rotary embeddings by layer, sliding windows, in global layers wider heads whose values are their keys,
scaled embeddings, a scale of the hidden states behind each layer, a tied head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rac_engine.models.plans import SANDWICH_NORM, Family, root_of_width


def unfit(config: Any) -> str | None:
    """Why a model with experts, inputs of each layer, or keys shared between layers is refused."""
    if config.enable_moe_block:
        return "enable_moe_block is set; experts beside an MLP of their own are not known"
    if config.hidden_size_per_layer_input:
        return "hidden_size_per_layer_input is set; inputs of each layer are not known"
    if getattr(config, "num_kv_shared_layers", 0):
        return "num_kv_shared_layers is set; layers that share keys and values are not known"
    return None


FAMILY = Family(
    "gemma4_text",
    "Gemma4",
    (SANDWICH_NORM[0], replace(SANDWICH_NORM[1], times="layer_scalar")),
    folder="gemma4",
    layer="TextDecoderLayer",
    rotary="TextRotaryEmbedding",
    embedding_scale=root_of_width,
    rotary_by_layer_type=True,
    unfit=unfit,
)
