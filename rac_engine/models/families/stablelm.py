"""StableLM: q k v and gate up, norms with biases before the blocks; partial rotary embeddings."""

from __future__ import annotations

from typing import Any

from rac_engine.models.plans import PRE_NORM, Family


def unfit(config: Any) -> str | None:
    """Attention and MLP beside one another (StableLM 2 12B): not a row of residual blocks."""
    return "use_parallel_residual is set; its layers are no row of blocks" if config.use_parallel_residual else None


FAMILY = Family("stablelm", "StableLm", PRE_NORM, unfit=unfit)
