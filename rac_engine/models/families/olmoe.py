"""OLMoE: q k v and gate up of each expert, norms before the blocks and on q and k over all heads."""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family("olmoe", "Olmoe", PRE_NORM, mixture=MIXTURE)
