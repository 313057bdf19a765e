"""Phi 3 and 4: fused qkv and gate_up, norms before the blocks; a sliding window, partial and long rotary embeddings."""

from __future__ import annotations

from rac_engine.models.plans import FUSED, Family

FAMILY = Family("phi3", "Phi3", FUSED)
