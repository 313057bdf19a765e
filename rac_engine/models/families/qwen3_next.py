"""Qwen 3 Next: three of four layers have linear attention (gated delta net), experts in all.

q (with a gate of the output), k, v or qkvz, and gate up of each expert; norms before the blocks and on q and k.
"""

from __future__ import annotations

from rac_engine.models.plans import DELTA_NET, PRE_NORM, Family, mixture

FAMILY = Family(
    "qwen3_next",
    "Qwen3Next",
    (DELTA_NET, *PRE_NORM),
    mixture=mixture("shared_expert"),
)
