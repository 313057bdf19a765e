"""VaultGemma: q k v and gate up, norms before the blocks.

Soft caps on scores and logits, a sliding window on every other layer, scaled embeddings, a tied head.
"""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import PRE_NORM, Family, root_of_width

FAMILY = Family(
    "vaultgemma",
    "VaultGemma",
    (PRE_NORM[0], replace(PRE_NORM[1], norm="pre_feedforward_layernorm")),
    embedding_scale=root_of_width,
)
