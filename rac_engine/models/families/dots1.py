"""dots.llm1: q k v and gate up of each expert, norms before the blocks and on q and k.

Shared experts, dense first layers, a sliding window on some layers.
"""

from __future__ import annotations

from rac_engine.models.plans import MIXTURE, PRE_NORM, Family

FAMILY = Family("dots1", "Dots1", PRE_NORM, mixture=MIXTURE)
