"""Qwen 3 VL, the language model: q k v and gate up, norms before the blocks and on q and k."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family(
    "qwen3_vl_text",
    "Qwen3VL",
    PRE_NORM,
    folder="qwen3_vl",
    layer="TextDecoderLayer",
    rotary="TextRotaryEmbedding",
)
