"""Llama: q k v and gate up, norms before the blocks; biases if the config has them."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("llama", "Llama", PRE_NORM)
