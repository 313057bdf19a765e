"""Nemotron H (Nemotron Nano 2 and 3): one block a layer, a state-space model (Mamba 2), attention, MLP or experts.

in_proj, q k v without positions, up without a gate; a norm before the block. Latent experts are not known.
"""

from __future__ import annotations

from typing import Any

from rac_engine.models.plans import BlockPlan, ExpertPlan, Family

_UP = ("up_proj",)


def unfit(config: Any) -> str | None:
    """Why a model with latent experts is refused."""
    if config.moe_latent_size is not None:
        return "moe_latent_size is set; experts that work in a latent space are not known"
    return None


FAMILY = Family(
    "nemotron_h",
    "NemotronH",
    (
        BlockPlan("mixer", "norm", ("in_proj",), "out_proj", recurrent=True),
        BlockPlan("mixer", "norm", ("q_proj", "k_proj", "v_proj"), "o_proj", attention=True),
        BlockPlan("mixer", "norm", _UP, "down_proj"),
    ),
    mixture=BlockPlan(
        "mixer",
        "norm",
        ("shared_experts.up_proj",),
        "shared_experts.down_proj",
        experts=ExpertPlan(_UP, "down_proj"),
    ),
    layer="Block",
    unfit=unfit,
    rotary=None,
    layers="backbone.layers.",
    embedding="backbone.embeddings.weight",
    norm="backbone.norm_f.weight",
)
