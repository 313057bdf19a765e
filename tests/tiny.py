"""Tiny random checkpoints of every family, saved by transformers itself, with tokenizer and calibration sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.traces.calibration import Calibration, Part, TokenSequence

VOCABULARY = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 11, "tie_word_embeddings": False},
    "phi3": {"sliding_window": 13, "pad_token_id": 0, "tie_word_embeddings": False},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 10,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 10,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
        "tie_word_embeddings": True,
    },
    "olmo2": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "granite": {
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 11, "tie_word_embeddings": False},
    "qwen3_moe": {
        "head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 128,
        },
        "tie_word_embeddings": False,
    },
    "gpt_oss": {
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "swiglu_limit": 2.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
        "tie_word_embeddings": False,
    },
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "tie_word_embeddings": False,
    },
    "nemotron_h": {
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "full_attention", "mlp", "moe", "linear_attention"],
        "head_dim": 12,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 8,
        "chunk_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 40,
        "tie_word_embeddings": False,
    },
    "jais2": {"tie_word_embeddings": False},
    "ministral3": {
        "head_dim": 12,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.3,
        },
        "tie_word_embeddings": False,
    },
}
PLAIN: dict[str, dict[str, Any]] = {
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "use_qk_norm": True,
        "attention_bias": True,
        "routed_scaling_factor": 2.5,
        "n_group": 2,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
    },
    "smollm3": {"no_rope_layers": [1, 0], "pad_token_id": 0, "tie_word_embeddings": True},
    "olmo3": {
        "num_key_value_heads": 4,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 8.0,
                "attention_factor": 1.2,
                "original_max_position_embeddings": 64,
            },
        },
        "pad_token_id": 0,
    },
    "exaone4": {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]},
    "seed_oss": {"head_dim": 12, "attention_bias": True, "attention_out_bias": False, "pad_token_id": 0},
    "minimax_m2": {
        "head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "rotary_dim": 6,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 2,
        "mlp_only_layers": [1],
    },
    "glm4_moe_lite": {
        "num_key_value_heads": 4,
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "ernie4_5": {"head_dim": 8, "use_bias": True, "tie_word_embeddings": True},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_dense": {
        "head_dim": 8,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
        "tie_word_embeddings": True,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 2], "head_dim": 8},
    "glm": {"head_dim": 8, "attention_bias": True, "pad_token_id": 0},
    "glm4": {"head_dim": 8, "attention_bias": True, "pad_token_id": 0},
    "exaone_moe": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "clip_qkv": 0.8, "pad_token_id": 0},
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "sliding_window": 9,
        "max_window_layers": 1,
        "norm_topk_prob": True,
    },
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "attention_bias": True,
        "lm_head_bias": True,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "short_mscale": 1.2,
            "long_mscale": 1.4,
            "original_max_position_embeddings": 20,
        },
    },
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16, "pad_token_id": 0},
    "apertus": {"pad_token_id": 0},
    "arcee": {"head_dim": 8, "tie_word_embeddings": True},
    "cwm": {
        "head_dim": 8,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention"],
        "eos_token_id": 1,
    },
    "ministral": {"head_dim": 8, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"]},
    "starcoder2": {"sliding_window": 9, "tie_word_embeddings": True},
    "nemotron": {"head_dim": 8},
    "gemma": {"head_dim": 8, "tie_word_embeddings": True},
    "solar_open": {
        "head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 2,
    },
    "vaultgemma": {
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 9,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    },
    "stablelm": {"use_qkv_bias": True, "qk_layernorm": True, "num_key_value_heads": 4},
    "internlm3": {"head_dim": 8, "attention_bias": True, "mlp_bias": True},
    "iquestcoder": {"head_dim": 8},
    "mimo_v2_flash": {
        "num_key_value_heads": 1,
        "head_dim": 12,
        "v_head_dim": 8,
        "sliding_window": 9,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 3,
    },
    "hy_v3": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_5_moe_text": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "tie_word_embeddings": True,
    },
    "qwen3_next": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 4,
        "layer_types": ["linear_attention", "full_attention"],
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [1],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
    "bamba": {
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "pad_token_id": 0,
    },
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 16,
        "shared_intermediate_size": 40,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_expand": 2,
        "mamba_chunk_size": 16,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "position_embedding_type": "nope",
    },
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "exaone": {},
    "cohere2": {
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
}
"""Families that are described in words that others use too: they go through fewer tests, in a smaller size."""


def config(family: str = "qwen2", **changes: Any) -> Any:
    """A config of that family; `changes` win."""
    plain = family in PLAIN
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32 if plain else 48,
        "intermediate_size": 40 if plain else 80,
        "num_hidden_layers": 2 if plain else 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "dtype": torch.bfloat16,
        **(PLAIN if plain else FAMILIES)[family],
        **changes,
    }
    return CONFIG_MAPPING[family](**settings)


def save(folder: Path, family: str = "qwen2", shard_size: int | str = "40KB", seed: int = 0, **changes: Any) -> Path:
    """Save a random model, with noise in its norms and biases too, so that nothing is trivially one or zero."""
    torch.manual_seed(seed)
    made = config(family, **changes)
    model = AutoModelForCausalLM.from_config(made).to(made.dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and (name != "lm_head.weight" or not made.tie_word_embeddings):
                tensor += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def calibration(lengths: Sequence[int] = (40, 17, 40, 25, 1, 9) * 4, seed: int = 0, part: Part = "all") -> Calibration:
    """Sequences of random tokens, of which the second halves are the completions."""
    draw = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        weights = None if part == "all" else (np.arange(length) >= length // 2).astype(np.float32)
        sequences.append(TokenSequence(draw.integers(0, VOCABULARY, length), length // 2, weights))
    return Calibration("random", "sequences", part, sequences)


def weighted() -> Calibration:
    """The sequences of `calibration`, each token with a weight of its own, some of them 0."""
    plain, draw = calibration(), np.random.default_rng(1)
    weights = [np.maximum(draw.random(len(s.token_ids)) * 3 - 0.5, 0).astype(np.float32) for s in plain.sequences]
    return replace(plain, sequences=[replace(s, weights=w) for s, w in zip(plain.sequences, weights, strict=True)])


def save_tokenizer(folder: Path, words: int = VOCABULARY) -> Path:
    """Save a tokenizer of `words` words (`<end>`, `<think>`, `</think>`, `w3` …) and a chat template beside a model."""
    names = ["<end>", "<user>", "<think>", "</think>", *(f"w{number}" for number in range(4, words))]
    tokenizer = Tokenizer(WordLevel({name: number for number, name in enumerate(names)}, unk_token="w4"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    made.chat_template = (
        "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    made.save_pretrained(folder)
    return folder
