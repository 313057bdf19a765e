"""Kimi K2: DeepSeek V3 by another name, which transformers does not know."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.families.deepseek_v3 import FAMILY as DEEPSEEK_V3

FAMILY = replace(DEEPSEEK_V3, model_type="kimi_k2", folder="deepseek_v3", config_type="deepseek_v3")
