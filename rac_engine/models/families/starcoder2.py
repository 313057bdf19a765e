"""StarCoder 2: q k v and c_fc, norms with biases before the blocks; biases, a sliding window."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("starcoder2", "Starcoder2", (PRE_NORM[0], replace(PRE_NORM[1], inputs=("c_fc",), output="c_proj")))
