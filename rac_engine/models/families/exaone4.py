"""EXAONE 4.0: q k v and gate up, norms after the blocks and on q and k.

A sliding window in three of four layers, and no rotary embeddings in the others, of some sizes.
"""

from __future__ import annotations

from rac_engine.models.plans import POST_NORM, Family

FAMILY = Family("exaone4", "Exaone4", POST_NORM)
