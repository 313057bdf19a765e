"""ERNIE 4.5: q k v and gate up, norms before the blocks; biases if the config has them."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("ernie4_5", "Ernie4_5", PRE_NORM)
