"""Qwen 3.5 and later, the language model: three of four layers have linear attention (gated delta net).

q (with a gate of the output), k, v or qkv, z, and gate up; norms before the blocks and on q and k.
"""

from __future__ import annotations

from rac_engine.models.plans import DELTA_NET, PRE_NORM, Family

FAMILY = Family("qwen3_5_text", "Qwen3_5", (DELTA_NET, *PRE_NORM), folder="qwen3_5", rotary="TextRotaryEmbedding")
