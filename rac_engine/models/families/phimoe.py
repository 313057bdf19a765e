"""Phi 3.5 MoE and Phi mini MoE: q k v and w1 w3 of each expert, norms with biases before the blocks.

Biases, rotary embeddings that depend on the length; the head may have a bias, which stays.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rac_engine.models.plans import MIXTURE, PRE_NORM, ExpertPlan, Family


def unfit(config: Any) -> str | None:
    """A window that is smaller than the sequences: transformers' module does not name it to an attention function."""
    if config.sliding_window is not None and config.sliding_window < config.max_position_embeddings:
        return f"sliding_window is {config.sliding_window}; phimoe models are pruned with full attention only"
    return None


FAMILY = Family(
    "phimoe",
    "Phimoe",
    PRE_NORM,
    mixture=replace(MIXTURE, experts=ExpertPlan(("w1", "w3"), "w2")),
    renames=(("mlp.router.", "block_sparse_moe.gate."), ("mlp.", "block_sparse_moe.")),
    unfit=unfit,
)
