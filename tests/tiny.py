"""Tiny random checkpoints of every family, saved by transformers itself, with tokenizer and calibration sequences."""

from __future__ import annotations

from collections.abc import Sequence as Lengths
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.traces import Calibration, Part, Sequence

VOCABULARY = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 24, "tie_word_embeddings": False},
}


def config(family: str = "qwen2", **changes: Any) -> Any:
    """A config of that family; `changes` win."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "dtype": torch.bfloat16,
        **FAMILIES[family],
        **changes,
    }
    return CONFIG_MAPPING[family](**settings)


def save(folder: Path, family: str = "qwen2", shard_size: int | str = "40KB", seed: int = 0, **changes: Any) -> Path:
    """Save a random model, with noise in its norms and biases too, so that nothing is trivially one or zero."""
    torch.manual_seed(seed)
    made = config(family, **changes)
    model = AutoModelForCausalLM.from_config(made).to(made.dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return folder


def calibration(lengths: Lengths[int] = (40, 17, 40, 25, 1, 9) * 4, seed: int = 0, part: Part = "all") -> Calibration:
    """Sequences of random tokens, of which the second halves are the completions."""
    draw = np.random.default_rng(seed)
    sequences = []
    for length in lengths:
        weights = None if part == "all" else (np.arange(length) >= length // 2).astype(np.float32)
        sequences.append(Sequence(draw.integers(0, VOCABULARY, length), length // 2, weights))
    return Calibration("random", "sequences", part, sequences)


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
