"""GLM-4: q k v and fused gate_up, norms before the blocks; biases on q k v, partial rotary embeddings."""

from __future__ import annotations

from rac_engine.models.plans import FUSED, PRE_NORM, Family

FAMILY = Family("glm", "Glm", (PRE_NORM[0], FUSED[1]))
