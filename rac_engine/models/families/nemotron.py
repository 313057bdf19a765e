"""Nemotron 4, Minitron: q k v and up, norms with biases before the blocks; partial rotary embeddings."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, UP_DOWN, Family

FAMILY = Family("nemotron", "Nemotron", (PRE_NORM[0], UP_DOWN))
