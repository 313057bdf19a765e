"""Qwen 1.5 and 2 MoE: q k v and gate up of each expert, norms before the blocks; biases on q k v.

A shared expert with a gate of its own, dense layers where the config says so.
"""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family, mixture

FAMILY = Family("qwen2_moe", "Qwen2Moe", PRE_NORM, mixture=mixture("shared_expert"))
