"""Every family that is known."""

from __future__ import annotations

from dataclasses import replace

from rac_engine.models.plans import (
    FUSED,
    LATENT,
    MIXTURE,
    POST_NORM,
    PRE_NORM,
    SANDWICH_NORM,
    ExpertPlan,
    Family,
    root_of_width,
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", PRE_NORM),
        Family("qwen2", "Qwen2", PRE_NORM),
        Family("qwen3", "Qwen3", PRE_NORM),
        Family("mistral", "Mistral", PRE_NORM),
        Family("phi3", "Phi3", FUSED),
        Family("gemma2", "Gemma2", SANDWICH_NORM, embedding_scale=root_of_width),
        Family(
            "gemma3_text",
            "Gemma3",
            SANDWICH_NORM,
            folder="gemma3",
            embedding_scale=root_of_width,
            rotary_by_layer_type=True,
        ),
        Family("olmo2", "Olmo2", POST_NORM),
        Family(
            "granite",
            "Granite",
            PRE_NORM,
            embedding_scale=lambda config, dtype: config.embedding_multiplier,
            residual_scale=lambda config: config.residual_multiplier,
        ),
        Family(
            "mixtral",
            "Mixtral",
            PRE_NORM,
            mixture=replace(MIXTURE, experts=ExpertPlan(("w1", "w3"), "w2")),
            renames=(("mlp.", "block_sparse_moe."),),
        ),
        Family("qwen3_moe", "Qwen3Moe", PRE_NORM, mixture=MIXTURE),
        Family(
            "deepseek_v3",
            "DeepseekV3",
            (LATENT, PRE_NORM[1]),
            mixture=MIXTURE,
            extra_layers="num_nextn_predict_layers",
        ),
        Family(
            "gpt_oss",
            "GptOss",
            PRE_NORM,
            mixture=replace(MIXTURE, experts=ExpertPlan(("gate_up_proj",), "down_proj", stacked=True)),
        ),
    )
}
