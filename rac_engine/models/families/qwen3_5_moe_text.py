"""Qwen 3.5 MoE and later, the language model: Qwen 3.5's layers with experts, stacked on disk in bf16, apart in FP8."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import DELTA_NET, PRE_NORM, ExpertPlan, Family, mixture

FAMILY = Family(
    "qwen3_5_moe_text",
    "Qwen3_5Moe",
    (DELTA_NET, PRE_NORM[0]),
    mixture=replace(mixture("shared_expert"), experts=ExpertPlan(("gate_up_proj",), "down_proj", stacked=True)),
    folder="qwen3_5_moe",
    rotary="TextRotaryEmbedding",
)
