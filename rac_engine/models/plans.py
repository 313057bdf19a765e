"""The words in which a family is described: blocks, experts, names."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class ExpertPlan:
    """The experts of a mixture, by the names of each one's matrices on disk."""

    inputs: tuple[str, ...] = ("gate_proj", "up_proj")
    output: str = "down_proj"
    stacked: bool = False
    """On disk, the matrices of all experts are one tensor [experts, columns, rows], and so are their biases."""


@dataclass(frozen=True)
class BlockPlan:
    """A residual block by the names of its parts within the layer."""

    module: str
    norm: str | None
    """Norm of the block's input; None: the input comes as it is."""
    inputs: tuple[str, ...]
    """Matrices that are given the block's input. Names that a layer does not have are passed over."""
    output: str
    attention: bool = False
    after: str | None = None
    """Norm of what the block adds to the hidden states."""
    between: tuple[str, ...] = ()
    """Matrices behind `inputs` that have an input of their own each."""
    experts: ExpertPlan | None = None
    """The experts of a mixture; `inputs` and `output` then name the shared experts, which all tokens go through."""


@dataclass(frozen=True)
class Family:
    """The models of one `model_type` as transformers builds them: class names start with `prefix`."""

    model_type: str
    prefix: str
    blocks: tuple[BlockPlan, ...]
    mixture: BlockPlan | None = None
    """Takes the place of the last block in layers that have experts."""
    renames: tuple[tuple[str, str], ...] = ()
    """Beginnings of names within a layer: (of transformers' module, on disk)."""
    folder: str | None = None
    """Folder of the modelling code in transformers.models; None: named like the model_type."""
    embedding_scale: Callable[[Any, torch.dtype], float] = lambda config, dtype: 1.0
    """Factor of the embeddings, from the config and their dtype."""
    residual_scale: Callable[[Any], float] = lambda config: 1.0
    """Factor of a block's output, from the config."""
    rotary_by_layer_type: bool = False
    """Whether the rotary embedding is asked for by `config.layer_types`."""
    extra_layers: str | None = None
    """The config's number of layers behind the last one that are on disk only."""
    further: tuple[str, ...] = ()
    """Beginnings of names on disk of other parts that predict further tokens and are on disk only."""
    fp32: tuple[str, ...] = ()
    """Parts of names of tensors to compute in fp32 besides those that transformers' class lists."""
    config_type: str | None = None
    """The model_type whose configuration class transformers has for it; None: its own."""
    unfit: Callable[[Any], str | None] = lambda config: None
    """Why a config of this family cannot be pruned; None if it can."""
    layers: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def find(self, kind: str) -> Any:
        """This family's class for `kind`, such as "DecoderLayer"."""
        folder = self.folder or self.model_type
        home = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        return getattr(home, self.prefix + kind)

    def make(self, kind: str, *args: Any) -> nn.Module:
        """An instance of the family's class for `kind`."""
        return self.find(kind)(*args)

    def on_disk(self, name: str) -> str:
        """The on-disk name within a layer of what transformers' module calls `name`."""
        for ours, theirs in self.renames:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def in_module(self, name: str) -> str:
        """The name in transformers' module of what is called `name` within a layer on disk."""
        for ours, theirs in self.renames:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name


def root_of_width(config: Any, dtype: torch.dtype) -> float:
    """√hidden, as rounded by the Gemma models."""
    return float(torch.tensor(config.hidden_size**0.5, dtype=dtype))


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

PRE_NORM = (
    BlockPlan("self_attn", "input_layernorm", _QKV, "o_proj", attention=True),
    BlockPlan("mlp", "post_attention_layernorm", _GATE_UP, "down_proj"),
)

POST_NORM = (
    BlockPlan("self_attn", None, _QKV, "o_proj", attention=True, after="post_attention_layernorm"),
    BlockPlan("mlp", None, _GATE_UP, "down_proj", after="post_feedforward_layernorm"),
)

SANDWICH_NORM = (
    BlockPlan("self_attn", "input_layernorm", _QKV, "o_proj", attention=True, after="post_attention_layernorm"),
    BlockPlan("mlp", "pre_feedforward_layernorm", _GATE_UP, "down_proj", after="post_feedforward_layernorm"),
)

FUSED = (
    BlockPlan("self_attn", "input_layernorm", ("qkv_proj",), "o_proj", attention=True),
    BlockPlan("mlp", "post_attention_layernorm", ("gate_up_proj",), "down_proj"),
)

LATENT = BlockPlan(
    "self_attn",
    "input_layernorm",
    ("q_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    "o_proj",
    attention=True,
    between=("q_b_proj", "kv_b_proj"),
)

UP_DOWN = replace(PRE_NORM[1], inputs=("up_proj",))


def mixture(shared: str = "shared_experts") -> BlockPlan:
    """A mixture of experts with its norm before it; `shared`: the expert that all tokens go through, if any."""
    inputs = tuple(f"{shared}.{name}" for name in _GATE_UP)
    return BlockPlan("mlp", "post_attention_layernorm", inputs, f"{shared}.down_proj", experts=ExpertPlan())


MIXTURE = mixture()
