"""Gemma 2: q k v and gate up, norms before and after the blocks.

Soft caps on scores and logits, a sliding window on every other layer, scaled embeddings, a tied head.
"""

from __future__ import annotations

from rac_engine.models.plans import SANDWICH_NORM, Family, root_of_width

FAMILY = Family("gemma2", "Gemma2", SANDWICH_NORM, embedding_scale=root_of_width)
