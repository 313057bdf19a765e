"""Gemma 3, the language model alone: q k v and gate up, norms before and after the blocks and on q and k.

Local and global rotary embeddings by layer, sliding windows, scaled embeddings, a tied head.
"""

from __future__ import annotations

from rac_engine.models.plans import SANDWICH_NORM, Family, root_of_width

FAMILY = Family(
    "gemma3_text",
    "Gemma3",
    SANDWICH_NORM,
    folder="gemma3",
    embedding_scale=root_of_width,
    rotary_by_layer_type=True,
)
