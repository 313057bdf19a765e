"""Gemma: q k v and gate up, norms before the blocks; scaled embeddings, a tied head."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family, root_of_width

FAMILY = Family("gemma", "Gemma", PRE_NORM, embedding_scale=root_of_width)
