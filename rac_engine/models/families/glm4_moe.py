"""GLM-4.5, 4.6 and 4.7: q k v and gate up of each expert, norms before the blocks and, of some sizes, on q and k.

Shared experts, routing in groups, dense first layers, partial rotary embeddings, a layer that only predicts further
tokens.
"""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family("glm4_moe", "Glm4Moe", PRE_NORM, mixture=MIXTURE, extra_layers="num_nextn_predict_layers")
