"""Jais 2: q k v and up, norms with biases before the blocks; biases."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, UP_DOWN, Family

FAMILY = Family("jais2", "Jais2", (PRE_NORM[0], UP_DOWN))
