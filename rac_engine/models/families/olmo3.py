"""OLMo 3: q k v and gate up, norms after the blocks and on q and k over all heads.

A sliding window in three of four layers, rotary embeddings by layer.
"""

from __future__ import annotations

from rac_engine.models.plans import POST_NORM, Family

FAMILY = Family("olmo3", "Olmo3", POST_NORM, rotary_by_layer_type=True)
