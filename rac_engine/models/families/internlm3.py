"""InternLM 3: q k v and gate up, norms before the blocks; transformers runs it as a Llama."""

from __future__ import annotations

from rac_engine.models.plans import PRE_NORM, Family

FAMILY = Family("internlm3", "Llama", PRE_NORM, folder="llama")
