"""SmolLM 3: q k v and gate up, norms before the blocks; no rotary embeddings in every fourth layer."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("smollm3", "SmolLM3", PRE_NORM)
