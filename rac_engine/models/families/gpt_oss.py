"""gpt-oss in bf16: q k v and gate_up of each expert, norms before the blocks.

Experts stacked and transposed on disk, with biases; sinks in the attention, a sliding window on every other layer.
"""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import MIXTURE, PRE_NORM, ExpertPlan, Family

FAMILY = Family(
    "gpt_oss",
    "GptOss",
    PRE_NORM,
    mixture=replace(
        MIXTURE,
        experts=ExpertPlan(("gate_up_proj",), "down_proj", stacked=True, transposed=True, biases=True),
    ),
)
