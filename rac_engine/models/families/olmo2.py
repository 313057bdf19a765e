"""OLMo 2: q k v and gate up, norms after the blocks and on q and k over all heads."""

from __future__ import annotations

from rac_engine.models.plans import POST_NORM, Family

FAMILY = Family("olmo2", "Olmo2", POST_NORM)
