"""A small random model of a config that transformers knows: the same layers, every size cut down."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, HEADS, HEAD = 64, 4, 16

VOCABULARY = 64

WINDOW = 7  # tokens: fewer than the sequences have, so that a window shows

ORIGINAL = 16  # positions before a rotary embedding is stretched: fewer than a sequence has, so that this shows too

MOST_LAYERS = 512

MOST = 1 << 24  # a whole number in a config: more than any model has layers, experts, heads or tokens

MOST_WEIGHTS = 64 << 20  # of the small model: more, and a size was not cut down


class Unfit(Exception):
    """Why a model cannot be taken apart: the rest of a sentence."""


def _at_most(most: int) -> Callable[[int], int]:
    return lambda value: min(value, most)


_SIZES: dict[str, Callable[[int], int]] = {
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "shared_intermediate_size"), _at_most(96)),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "expert_intermediate_size"), _at_most(32)),
    **dict.fromkeys(("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), _at_most(40)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _at_most(8)),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), _at_most(2)),
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), _at_most(WINDOW)),
    "n_group": _at_most(2),
    "topk_group": _at_most(1),
    "q_lora_rank": _at_most(24),
    "kv_lora_rank": _at_most(16),
    "qk_nope_head_dim": _at_most(16),
    "qk_rope_head_dim": _at_most(8),
    "v_head_dim": _at_most(16),
    "max_position_embeddings": _at_most(512),
}
"""Sizes that a config may have, each with what becomes of it; None stays None and nothing becomes larger."""

_HARMLESS = {
    *("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "qk_head_dim", "vocab_size"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),  # all of these are cut down by name
    *("num_hidden_layers", "max_window_layers", "moe_layer_end_index", "full_attn_idxs"),  # the layers stay
    *("rope_theta", "factor", "long_factor", "short_factor", "query_pre_attn_scalar"),  # count at every position
    *("original_max_position_embeddings", "num_attention_heads_per_layer"),
}

VISIBLE = 16  # a number that is smaller shows in sequences of `LENGTHS` tokens


def parse(config: Mapping[str, Any]) -> Any:
    """The configuration object that transformers makes of a config.json of a causal language model.

    Raises `Unfit` where transformers has no such model, and for counts that no model has.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise Unfit("transformers has no causal language model of that name")
    if any(type(value) is int and value > MOST for value in config.values()):
        raise Unfit(f"it has a number above {MOST:,}, which no model has")
    if any(type(value) is int and "layers" in key and value > MOST_LAYERS for key, value in config.items()):
        raise Unfit(f"it has more than {MOST_LAYERS} layers")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    parsed = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(plain))
    if parsed.get_text_config(decoder=True) is not parsed:
        raise Unfit("its language model lies within another model")
    if getattr(parsed, "is_encoder_decoder", False):
        raise Unfit("it has an encoder")
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if type(getattr(parsed, name, None)) is not int:
            raise Unfit(f"its config has no {name}")
    if not 0 < parsed.num_hidden_layers <= MOST_LAYERS:
        raise Unfit(f"it has {parsed.num_hidden_layers} layers")
    return parsed


def hidden_number(config: Any) -> str | None:
    """The name of a number that a small model would not show the effect of, such as how many tokens an index keeps."""
    known = _HARMLESS | _SIZES.keys()
    known |= {own for name, own in config.attribute_map.items() if name in known}

    def among(values: Mapping[str, Any]) -> str | None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                if (found := among(value)) is not None:
                    return found
            elif name not in known:
                numbers = value if isinstance(value, list | tuple) else [value]
                if any(type(number) is int and number >= VISIBLE for number in numbers):
                    return name
        return None

    declared = {each.name for each in dataclasses.fields(config)}
    return among({name: value for name, value in vars(config).items() if name in declared})


def shrink(config: Any) -> Any:
    """A copy of a configuration object with the same layers and small sizes."""
    small = copy.deepcopy(config)
    wide = config.hidden_size // max(config.num_attention_heads, 1)
    if getattr(config, "num_key_value_heads", None) is not None:
        shared = config.num_key_value_heads < config.num_attention_heads
        small.num_key_value_heads = min(config.num_key_value_heads, HEADS // 2 if shared else HEADS)
    small.num_attention_heads, small.hidden_size, small.vocab_size = HEADS, HIDDEN, VOCABULARY
    for name, cut in _SIZES.items():
        value = getattr(small, name, None)
        if type(value) is int and value > 0:
            setattr(small, name, cut(value))
        elif isinstance(value, list | tuple) and value and all(type(each) is int for each in value):
            setattr(small, name, [cut(each) for each in value])
    latent = getattr(small, "qk_rope_head_dim", None)
    head = HEAD
    if latent:
        small.qk_head_dim = small.qk_nope_head_dim + latent
        head = latent
    elif getattr(config, "head_dim", None) not in (None, wide):
        head = HEAD + 8  # as there, not the width of all heads together
    if hasattr(config, "head_dim"):
        small.head_dim = head
    _shrink_rope(getattr(small, "rope_parameters", None), head, small)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(small, name, None)
        if isinstance(value, list):
            setattr(small, name, [min(each, VOCABULARY - 1) for each in value])
        elif type(value) is int:
            setattr(small, name, min(value, VOCABULARY - 1))
    if hasattr(small, "initializer_range"):
        small.initializer_range = 0.2
    return small


def _shrink_rope(rope: Any, head: int, config: Any) -> None:
    """Cut down what a rotary embedding is told: factors by frequency, and the length it was made for."""
    if not isinstance(rope, dict):
        return
    for part in rope.values():
        _shrink_rope(part, head, config)
    turned = int(head * float(rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None) or 1)))
    for name in ("long_factor", "short_factor"):
        if isinstance(rope.get(name), list):
            rope[name] = rope[name][: turned // 2]
    if rope.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = ORIGINAL


@contextmanager
def _own_chance() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def skeleton(config: Any) -> PreTrainedModel:
    """The causal language model of a configuration in bf16, without weights."""
    with torch.device("meta"):
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return made


def build(config: Any) -> PreTrainedModel:
    """The causal language model of a small configuration, with random fp32 weights that are all different.

    Raises `Unfit` for one that is not small, and whatever transformers raises.
    """
    config._attn_implementation, config.dtype = "eager", torch.float32
    bare = skeleton(config)
    if sum(tensor.numel() for tensor in bare.state_dict().values()) > MOST_WEIGHTS:
        raise Unfit("no small model of its config could be made: some size is under a name that is not known")
    with _own_chance():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config).float()
        model.eval().requires_grad_(False)
        for tensor in {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}.values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
    return model
