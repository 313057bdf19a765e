"""Command R7B and Command A: q k v and gate up behind one norm, whose outputs are added together.

Sliding windows in three of four layers, no positions in the others, a tied head.
"""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("cohere2", "Cohere2", (replace(PRE_NORM[0], beside=PRE_NORM[1]),))
