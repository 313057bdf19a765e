"""The words in which a family is described: blocks, experts, names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Set
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
    """On disk, the matrices of all experts are one tensor [experts, rows, columns], and so are their biases."""
    transposed: bool = False
    """Stacked matrices are [experts, columns, rows]."""
    biases: bool = False
    """Every matrix has a bias."""


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
    recurrent: bool = False
    """Whether the module hands a state from token to token: linear attention, a state-space model, a convolution."""
    after: str | None = None
    """Norm of what the block adds to the hidden states."""
    times: str | None = None
    """Tensor [1] of the layer that the hidden states behind the block are multiplied by."""
    between: tuple[str, ...] = ()
    """Matrices behind `inputs` that have an input of their own each."""
    beside: BlockPlan | None = None
    """An MLP that is given the same normalised input, and whose output is added to the module's."""
    experts: ExpertPlan | None = None
    """The experts of a mixture; `inputs` and `output` then name the shared experts, which all tokens go through."""

    @property
    def mixes(self) -> bool:
        """Whether tokens see those before them in their sequence."""
        return self.attention or self.recurrent

    def is_in(self, layer: nn.Module) -> bool:
        """Whether a decoder layer of transformers has this block: its last matrix, or the experts."""
        home = next((module for name, module in layer.named_modules() if name == self.module), None)
        if home is None:
            return False
        if self.experts is not None:
            return hasattr(home, "experts")
        return any(name == self.output for name, _ in home.named_modules())


@dataclass(frozen=True)
class Family:
    """The models of one `model_type` as transformers builds them: class names start with `prefix`.

    A layer has those of `blocks` and `mixture`, in their order, whose modules it has.
    """

    model_type: str
    prefix: str
    blocks: tuple[BlockPlan, ...]
    mixture: BlockPlan | None = None
    """The last block of layers that have experts."""
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
    layer: str = "DecoderLayer"
    """Kind of class of a decoder layer."""
    rotary: str | None = "RotaryEmbedding"
    """Kind of class of the rotary embedding; None: positions are not told to the attention."""
    has_positions: Callable[[Any], bool] = lambda config: True
    """Whether a config has the rotary embedding."""
    extra_layers: str | None = None
    """The config's number of layers behind the last one that are on disk only."""
    further: tuple[str, ...] = ()
    """Beginnings of names on disk of other parts that predict further tokens and are on disk only."""
    fp32: tuple[str, ...] = ()
    """Parts of names of tensors to compute in fp32 besides those that transformers' class lists."""
    config_type: str | None = None
    """The model_type whose configuration class transformers has for it; None: its own."""
    traced: bool = False
    """Whether no file describes it: it was found by tracing a small model."""
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

    def within(self, layer: nn.Module) -> tuple[BlockPlan, ...]:
        """The residual blocks that a decoder layer of transformers has."""
        every = self.blocks if self.mixture is None else (*self.blocks, self.mixture)
        found = [plan for plan in every if plan.is_in(layer)]
        beside = {plan.beside.module for plan in found if plan.beside is not None}
        return tuple(plan for plan in found if plan.module not in beside)

    def as_stored(self, names: Iterable[str]) -> Family:
        """The family with its language model and experts called as they are among the tensors `names` on disk.

        A model that also takes images has its language model under a further name, and one that was saved without its
        head has nothing before `layers`. Experts may be apart in one checkpoint and stacked in another one.
        """
        have, family = set(names), self
        if have and self.embedding not in have:
            others = (*map(self._under, _PREFIXES), self._bare())
            family = next((other for other in others if other.embedding in have), self)
        return family._with_experts_as_in(have)

    def _under(self, prefix: str) -> Family:
        """The same family with what is called `model.` called otherwise, and the head beside it."""
        names = [name.replace("model.", f"{prefix}.", 1) for name in (self.layers, self.embedding, self.norm)]
        layers, embedding, norm = names
        head = f"{prefix.removesuffix('.model')}.{self.head}" if prefix.endswith(".model") else self.head
        return replace(self, layers=layers, embedding=embedding, norm=norm, head=head)

    def _bare(self) -> Family:
        """The same family without the first part of its names (`model.`), but for the head's."""
        first = f"{self.layers.partition('.')[0]}."
        names = [name.removeprefix(first) for name in (self.layers, self.embedding, self.norm)]
        layers, embedding, norm = names
        further = tuple(name.removeprefix(first) for name in self.further)
        return replace(self, layers=layers, embedding=embedding, norm=norm, further=further)

    def _with_experts_as_in(self, have: Set[str]) -> Family:
        """The same family with its experts apart or stacked as they are among the tensors `have` on disk.

        Stacked where the family's are apart, they are called as in transformers' own modules.
        """
        mixture = self.mixture
        if mixture is None or mixture.experts is None:
            return self
        inside = {name.removeprefix(self.layers).partition(".")[2] for name in have if name.startswith(self.layers)}
        home = f"{mixture.module}.experts."
        if mixture.experts.stacked:
            apart = self.on_disk(f"{home}0.")
            here = any(name.startswith(apart) for name in inside)
            return replace(self, mixture=replace(mixture, experts=ExpertPlan())) if here else self
        for family in (self, replace(self, renames=())):
            for entrance in ("gate_up_proj", "up_proj"):
                if {family.on_disk(f"{home}{entrance}"), family.on_disk(f"{home}down_proj")} <= inside:
                    plan = ExpertPlan((entrance,), "down_proj", stacked=True)
                    return replace(family, mixture=replace(mixture, experts=plan))
        return self

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


_PREFIXES = ("model.language_model", "language_model.model")
"""Names of the language model within one that also takes images: since transformers 4.52, and before."""


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

MAMBA = BlockPlan("mamba", "input_layernorm", ("in_proj",), "out_proj", recurrent=True)

DELTA_NET = BlockPlan(
    "linear_attn",
    "input_layernorm",
    ("in_proj_qkv", "in_proj_z", "in_proj_qkvz"),
    "out_proj",
    recurrent=True,
)
"""Linear attention. What makes its gates and decays (in_proj_b and in_proj_a, a row a head) stays as it is."""
