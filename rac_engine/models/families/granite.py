"""Granite: q k v and gate up, norms before the blocks; multipliers on embeddings, attention and residuals."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family(
    "granite",
    "Granite",
    PRE_NORM,
    embedding_scale=lambda config, dtype: config.embedding_multiplier,
    residual_scale=lambda config: config.residual_multiplier,
)
