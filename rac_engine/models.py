"""What a decoder layer is in each model family, on transformers' own modules.

A decoder layer is a row of residual blocks, hidden + scale · after(output(inner(norm(hidden)))): attention and MLP. The
matrices at the entrance of `inner` (q, k, v; gate, up) share one input, the matrix `output` (o; down) has an input of
its own: taken apart there, a layer can be calibrated and pruned stage by stage. Layers are built on the meta device and
filled with tensors by their on-disk names, so no more than a layer's weights need to be in memory.

To add a family, describe it in `FAMILIES` (docs/families.md is the page about it) and in tests/tiny.py: the tests hold
every family there against transformers' own forward pass.

Of a mixture of experts, transformers holds the experts' weights in fused tensors; on disk every expert has matrices of
its own. Here they are modules of their own again (`Mixture`), in place of the fused ones: the router and all around it
stay transformers'.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.checkpoint import Checkpoint, TensorInfo, fp8_block
from rac_engine.errors import BadInput

ATTENTION = "rac_packed"
EMBEDDINGS = -1  # where the table of embeddings stands among the layers; lm_head stands behind the last one
_QUERY_BLOCK = 1024  # rows of a mask that exist at a time
_MASK_BYTES = 16 << 20  # of such a mask, at most, as fp32
_SCORE_BYTES = 64 << 20  # of attention scores that exist at a time, where they have to be computed in the open
_FUSED_WIDTH = 256  # of heads, at most, in the kernels that hold no scores


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
    """Of the block's input; None: it comes as it is."""
    inputs: tuple[str, ...]
    """Matrices that are given the block's input. Names that a layer does not have are passed over."""
    output: str
    attention: bool = False
    after: str | None = None
    """Norm of what the block adds to the hidden states."""
    between: tuple[str, ...] = ()
    """Matrices behind `inputs` that have an input of their own each."""
    experts: ExpertPlan | None = None
    """Of a mixture; `inputs` and `output` are then of what all tokens go through (shared experts), if there is any."""


# What transformers makes lists of: a config that asks for more than any model has would be obeyed for days.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 10_000,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), 100_000),
}


_MOST_ANGLES = 1 << 20  # of rotary embeddings, which are computed as soon as a model is opened


@dataclass(frozen=True)
class Family:
    """How transformers builds models of one `model_type`: class names start with `prefix`."""

    model_type: str
    prefix: str
    blocks: tuple[BlockPlan, ...]
    mixture: BlockPlan | None = None
    """Takes the place of the last block in layers that have experts."""
    renames: tuple[tuple[str, str], ...] = ()
    """Beginnings of names within a layer: (of transformers' module, on disk)."""
    folder: str | None = None
    """Of the modelling code in transformers.models; None: named like the model_type."""
    embedding_scale: Callable[[Any, torch.dtype], float] = lambda config, dtype: 1.0
    """What embeddings of that dtype are multiplied by, from the config."""
    residual_scale: Callable[[Any], float] = lambda config: 1.0
    """What a block's output is multiplied by, from the config."""
    rotary_by_layer_type: bool = False
    """Whether the rotary embedding is asked for by `config.layer_types`."""
    extra_layers: str | None = None
    """The config's number of layers behind the last one that are on disk only."""
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
        """An instance of it."""
        return self.find(kind)(*args)

    def on_disk(self, name: str) -> str:
        """The on-disk name within a layer of what transformers' module calls `name`."""
        for ours, theirs in self.renames:
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def in_module(self, name: str) -> str:
        """The other way about."""
        for ours, theirs in self.renames:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name


def _root_of_width(config: Any, dtype: torch.dtype) -> float:
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
SHARED = tuple(f"shared_experts.{name}" for name in _GATE_UP)
MIXTURE = BlockPlan("mlp", "post_attention_layernorm", SHARED, "shared_experts.down_proj", experts=ExpertPlan())
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", PRE_NORM),
        Family("qwen2", "Qwen2", PRE_NORM),
        Family("qwen3", "Qwen3", PRE_NORM),
        Family("mistral", "Mistral", PRE_NORM),
        Family("phi3", "Phi3", FUSED),
        Family("gemma2", "Gemma2", SANDWICH_NORM, embedding_scale=_root_of_width),
        Family(
            "gemma3_text",
            "Gemma3",
            SANDWICH_NORM,
            folder="gemma3",
            embedding_scale=_root_of_width,
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


@dataclass(frozen=True)
class Group:
    """Matrices that share an input, by their names within the layer on disk.

    The stages of a layer follow one another in the data's way; the inputs of the groups of one stage do not depend on
    each other's matrices.
    """

    block: int
    stage: int
    modules: tuple[str, ...]
    expert: int | None = None
    """Whose they are, of the experts that only some tokens go through."""
    share: float = 1.0
    """Of the tokens, how many come here if the router spreads them evenly."""

    @property
    def input(self) -> str:
        """Name of the input: that of the first matrix it goes to."""
        return self.modules[0]


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns] that can be pruned."""

    layer: int
    group: Group
    module: str
    """Name within the layer: `self_attn.q_proj`."""
    name: str
    """Name on disk: `model.layers.0.self_attn.q_proj.weight`; of stacked ones, `mlp.experts.down_proj[3]`."""
    rows: int
    columns: int
    dtype: torch.dtype
    tensor: str
    """The tensor on disk: the `name`, unless the matrix is one of several stacked there."""

    def of(self, tensor: Tensor) -> Tensor:
        """The matrix [rows, columns] as a view of its tensor."""
        return tensor if self.tensor == self.name else tensor[self.group.expert].T

    @property
    def stage(self) -> int:
        """Of the layer's stages, counted from 0."""
        return self.group.stage

    @property
    def path(self) -> str:
        """Name of the module in the whole model."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` up to `stop`: whole sequences of `lengths` behind one another, or a part of one that is longer.

    A part is the tokens from `offset` on of a sequence of `lengths[0]` tokens. Parts go through a block in order.
    """

    start: int
    stop: int
    lengths: tuple[int, ...]
    offset: int = 0

    @property
    def is_part(self) -> bool:
        """Whether there is more of the sequence in other chunks."""
        return self.stop - self.start < self.lengths[0]


class KeyValues:
    """Keys and values of a sequence that goes through an attention in parts: transformers' cache, in its full size."""

    def __init__(self, length: int) -> None:
        self._length, self._seen = length, 0
        self._held: tuple[Tensor, ...] = ()

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        """Take key and value [1, heads, tokens, d] of the next tokens; returns those of all tokens so far."""
        if not self._held:
            self._held = tuple(x.new_empty(*x.shape[:2], self._length, x.shape[3]) for x in (key, value))
        first, self._seen = self._seen, self._seen + key.shape[2]
        for held, new in zip(self._held, (key, value), strict=True):
            held[:, :, first : self._seen] = new
        return tuple(held[:, :, : self._seen] for held in self._held)


Tap = Callable[[Tensor, Tensor | None], None]
"""What is shown an input [tokens, columns] and, where not all tokens of the piece are there, which ones are."""


class _Enough(Exception):
    """Everything that was to be seen has been seen."""


class _Viewing:
    """What is to see the inputs of one pass through a block, by the inputs' names."""

    def __init__(self, taps: Mapping[str, Tap], through: bool) -> None:
        self.taps, self.through = taps, through
        self.left = set(taps)

    def see(self, name: str, x: Tensor, tokens: Tensor | None = None) -> None:
        """Show an input, if anything is to see it; ends the pass when nothing else is to be seen."""
        if name in self.left:
            self.left.discard(name)
            self.taps[name](x, tokens)
        self.end()

    def end(self) -> None:
        """End the pass if nothing is left to be seen."""
        if not self.left and not self.through:
            raise _Enough


class Expert(nn.Module):
    """One expert of a mixture: output(activation(inputs(x)))."""

    def __init__(self, plan: ExpertPlan, activation: Callable[..., Tensor], shapes: Mapping[str, tuple[int, int]]):
        super().__init__()
        for name in (*plan.inputs, plan.output):
            rows, columns = shapes[name]
            self.add_module(name, nn.utils.skip_init(nn.Linear, columns, rows, bias=plan.stacked, device="meta"))
        self._plan, self._activation = plan, activation

    def inner(self, x: Tensor) -> Tensor:
        """x [tokens, hidden] to the input of the last matrix."""
        return self._activation(*(self.get_submodule(name)(x) for name in self._plan.inputs))

    def outer(self, inner: Tensor) -> Tensor:
        """The input of the last matrix to the expert's output [tokens, hidden]."""
        return self.get_submodule(self._plan.output)(inner)


class Mixture(nn.ModuleList):
    """Experts as modules of their own, by their on-disk names, in the place of transformers' fused ones."""

    def __init__(self, fused: Any, plan: ExpertPlan) -> None:
        if plan.stacked:
            shapes = {name: tuple(getattr(fused, name).shape[:0:-1]) for name in (*plan.inputs, plan.output)}
            activation = fused._apply_gate
        else:
            width, hidden = fused.intermediate_dim, fused.hidden_dim
            shapes = dict.fromkeys(plan.inputs, (width, hidden)) | {plan.output: (hidden, width)}
            act = fused.act_fn

            def activation(gate: Tensor, up: Tensor) -> Tensor:
                return act(gate) * up

        super().__init__(Expert(plan, activation, shapes) for _ in range(fused.num_experts))
        self.plan = plan
        self.names: list[tuple[str, str]] = []
        """Of every expert's two inputs."""
        self.viewing = _Viewing({}, through=True)

    def forward(self, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """The experts' outputs [tokens, hidden] for hidden [tokens, hidden], added up.

        `chosen` [tokens, k] are the numbers of the experts that a token goes to, `shares` [tokens, k] what their
        outputs are multiplied by.
        """
        viewing = self.viewing
        out = torch.zeros_like(hidden)
        # Every expert's tokens in their order, by one sort and one look at the counts.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self)).tolist()
        experts = cast(Iterator[Expert], iter(self))
        for expert, places, names in zip(experts, order.split(counts), self.names, strict=True):
            if not len(places) or not (viewing.through or viewing.left.intersection(names)):
                continue
            tokens = places // chosen.shape[1]
            x = hidden[tokens]
            viewing.see(names[0], x, tokens)
            if not viewing.through and names[1] not in viewing.left:
                continue
            inner = expert.inner(x)
            viewing.see(names[1], inner, tokens)
            if viewing.through:
                added = expert.outer(inner) * shares.flatten()[places, None]
                out.index_add_(0, tokens, added.to(out.dtype))
        viewing.left.difference_update(name for names in self.names for name in names)  # experts without a token
        viewing.end()
        return out


class Block:
    """A residual block with its weights.

    What its matrices are given is seen on the way through it, by the names of the inputs (`Group.input`).
    """

    def __init__(
        self,
        layer: nn.Module,
        plan: BlockPlan,
        groups: Sequence[Group],
        family: Family,
        rotary: Callable[[Tensor, Chunk], Any],
        scale: float = 1.0,
    ) -> None:
        self.plan, self.groups = plan, groups
        self.norm = nn.Identity() if plan.norm is None else layer.get_submodule(plan.norm)
        self._after = nn.Identity() if plan.after is None else layer.get_submodule(plan.after)
        self._rotary, self._scale = rotary, scale
        self._module = layer.get_submodule(plan.module)
        self._seen: KeyValues | None = None
        """Of the sequence of which a part has gone through an attention."""
        taken = inspect.signature(self._module.forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"  # renamed by transformers 5.24
        self.linears = {name: layer.get_submodule(family.in_module(name)) for group in groups for name in group.modules}
        """The block's matrices by their names within the layer on disk."""
        shared = [group for group in groups if group.expert is None]
        self.first = shared[0].input if shared else family.on_disk(plan.module)
        """Name of the block's own input, which all tokens have."""
        self.last: str | None = None
        """Name of the input of the last matrix, where `inner` ends with it: not in a mixture."""
        self.width = 0
        """Columns of the last matrix."""
        self._output: nn.Module = nn.Identity()
        self._mixture: Mixture | None = None
        self._routed: dict[str, tuple[Expert, bool]] = {}
        """By the inputs of experts' matrices: whose they are, and whether they are the last matrix's."""
        self._between = [group.input for group in shared[1:]]
        if plan.experts is None:
            self.last = self._between.pop()
            self._output = self.linears[self.last]
            self.width = self._output.get_parameter("weight").shape[1]
            # The module's own forward then ends with what goes into its last matrix.
            setattr(self._module, plan.output, nn.Identity())
        else:
            self._mixture = next(part for part in self._module.modules() if isinstance(part, Mixture))
            of_experts = [group for group in groups if group.expert is not None]
            half = len(of_experts) // 2
            self._mixture.names = [
                (first.input, last.input) for first, last in zip(of_experts[:half], of_experts[half:], strict=True)
            ]
            for expert, (entrance, exit_) in zip(self._mixture, self._mixture.names, strict=True):
                self._routed |= {entrance: (cast(Expert, expert), False), exit_: (cast(Expert, expert), True)}

    def inner(self, x: Tensor, chunk: Chunk, taps: Mapping[str, Tap] | None = None) -> Tensor:
        """The block's input x [tokens, hidden], normalised, to the input of `output` [tokens, its columns].

        In a mixture, there is no such input, and it goes to the block's end. `taps` are shown the inputs they name.
        """
        return self._pass(x, chunk, _Viewing(taps or {}, through=True))

    def look(self, x: Tensor, chunk: Chunk, taps: Mapping[str, Tap]) -> None:
        """Show `taps` the inputs they name, going no further than that takes."""
        with suppress(_Enough):
            self._pass(x, chunk, _Viewing(taps, through=False))

    def is_routed(self, name: str) -> bool:
        """Whether an input is an expert's."""
        return name in self._routed

    def routed(self, name: str, x: Tensor) -> Tensor:
        """What an expert's input would be, if the tokens x [tokens, hidden] came to that expert."""
        expert, last = self._routed[name]
        return expert.inner(x) if last else x

    def routed_output(self, name: str, inner: Tensor) -> Tensor:
        """What an expert's last matrix gives [tokens, hidden] for its input, called `name`, without its bias."""
        output = self.linears[name]
        return F.linear(inner, output.get_parameter("weight"))

    def leave(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """What the block hands on [tokens, hidden], from what it was given and its `inner`."""
        return self.add(hidden, self.output(inner))

    def output(self, inner: Tensor) -> Tensor:
        """What the last matrix gives [tokens, hidden], its bias included."""
        output: Tensor = self._output(inner)
        return output

    @property
    def bias(self) -> Tensor | None:
        """The last matrix's bias [hidden]."""
        return cast("Tensor | None", getattr(self._output, "bias", None))

    def add(self, hidden: Tensor, output: Tensor) -> Tensor:
        """What the block hands on [tokens, hidden], from what it was given and the `output` of its last matrix."""
        added = self._after(output)
        return hidden + (added if self._scale == 1 else added * self._scale)

    def missing(self, wanted: Tensor, hidden: Tensor) -> Tensor | None:
        """What more the last matrix would have to give for `hidden` [tokens, hidden] to become `wanted`.

        None where a norm stands behind the matrix, so that there is no such answer.
        """
        if self.plan.after is not None:
            return None
        return (wanted.float() - hidden.float()).div_(self._scale).to(hidden.dtype)

    @contextmanager
    def copied(self) -> Iterator[dict[str, nn.Module]]:
        """For a while, all of the block's parameters are copies in fp32. Gives its matrices' modules by their names."""
        parts = (self.norm, self._module, self._output, self._after)
        held = {
            (module, name): parameter
            for part in parts
            for module in part.modules()
            for name, parameter in module.named_parameters(recurse=False)
        }
        try:
            for (module, name), parameter in held.items():
                copy = parameter.detach().to(torch.float32, copy=True)
                module.register_parameter(name, nn.Parameter(copy, requires_grad=False))
            yield self.linears
        finally:
            for (module, name), parameter in held.items():
                module.register_parameter(name, parameter)

    def _pass(self, x: Tensor, chunk: Chunk, viewing: _Viewing) -> Tensor:
        viewing.see(self.first, x)
        hooks = [self._watch(name, viewing, len(x)) for name in self._between if name in viewing.left]
        if self._mixture is not None:
            self._mixture.viewing = viewing
        try:
            if self.plan.attention:
                inner = self._attend(x, chunk)
            else:
                made = self._module(x[None])
                inner = (made[0] if isinstance(made, tuple) else made)[0]
        finally:
            for hook in hooks:
                hook.remove()
            if self._mixture is not None:
                self._mixture.viewing = _Viewing({}, through=True)  # holds on to nothing that was gathered
        if self.last is not None:
            viewing.see(self.last, inner)
        return inner

    def _attend(self, x: Tensor, chunk: Chunk) -> Tensor:
        lengths = chunk.lengths
        if not chunk.is_part:
            self._seen = None
        else:
            lengths = (len(x),)
            if chunk.offset == 0:
                self._seen = KeyValues(chunk.lengths[0])
        inner: Tensor = self._module(
            x[None],
            position_embeddings=self._rotary(x[None], chunk),
            attention_mask=None,
            lengths=lengths,
            **{self._cache_name: self._seen},
        )[0][0]
        if chunk.offset + len(x) == chunk.lengths[0]:
            self._seen = None  # the last part
        return inner

    def _watch(self, name: str, viewing: _Viewing, tokens: int) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            # Where keys are computed from what the cache holds, earlier parts of the sequence come before the tokens.
            viewing.see(name, given[0].flatten(0, -2)[-tokens:])

        return self.linears[name].register_forward_pre_hook(hook)


class Head(Block):
    """The final norm, behind it `lm_head`, as a block that no token needs to get through: its input is all there is."""

    def __init__(self, norm: nn.Module, group: Group) -> None:
        self.plan = BlockPlan("", None, group.modules, group.input)
        self.groups, self.norm, self.linears = [group], norm, {}
        self.first, self.last, self.width = group.input, None, 0

    def leave(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """Nothing comes of it."""
        return hidden

    def _pass(self, x: Tensor, chunk: Chunk, viewing: _Viewing) -> Tensor:
        viewing.see(self.first, x)
        return x


class Model:
    """A checkpoint of a known family, taken apart into embedding and decoder layers. Made by `open`."""

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Any) -> None:
        self.checkpoint, self.family, self.config = checkpoint, family, config
        self.layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.dtype = _compute_dtype(checkpoint, family)
        self._routed: int = getattr(config, "num_experts_per_tok", 0)
        self._pretrained = family.find("PreTrainedModel")
        with torch.device("meta"):
            angles = sum(buffer.numel() for buffer in family.make("RotaryEmbedding", config).buffers())
        if angles > _MOST_ANGLES:
            raise BadInput(
                f"{checkpoint.path / 'config.json'}: heads of more than {_MOST_ANGLES:,} elements, which no model has; "
                "the file is not to be trusted"
            )
        self._rotary = family.make("RotaryEmbedding", config)
        self._mixtures: dict[int, bool] = {}
        self._groups: dict[bool, list[Group]] = {}

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Model:
        """Raises `BadInput` for an unknown family and for tensors that do not fit the config."""
        model, shapes = cls._of(checkpoint)
        model._check(shapes)
        return model

    @classmethod
    def of_config(cls, path: Path, config: dict[str, Any]) -> Model:
        """The model that a config.json (in the folder `path`) describes, for planning: it has no weights to be read."""
        model, shapes = cls._of(Checkpoint(path, config, {}, {}))
        named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
        model.dtype = named
        model.checkpoint.tensors.update(
            (name, TensorInfo(name, path, named, shape, 0, math.prod(shape) * named.itemsize))
            for name, shape in shapes.items()
        )
        return model

    @classmethod
    def _of(cls, checkpoint: Checkpoint) -> tuple[Model, dict[str, tuple[int, ...]]]:
        """The model, and the shapes of all tensors that its config calls for."""
        where, kind = checkpoint.path / "config.json", checkpoint.config.get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None:
            raise BadInput(
                f"{where}: model_type {kind!r} is not known; known are {', '.join(sorted(FAMILIES))} "
                "(docs/families.md says how to add one)"
            )
        for key in ("sparsity_config", "compression_config", "compression"):
            if key in checkpoint.config:
                raise BadInput(
                    f"{where}: {key} is set, so the weights are compressed, or would be taken for it; prune the model "
                    "that it was made from, or remove the key if the weights are plain"
                )
        block, quantization = fp8_block(checkpoint.config), checkpoint.config.get("quantization_config")
        if block is None and "quantization_config" in checkpoint.config:
            method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
            raise BadInput(
                f"{where}: the weights are quantized ({method}); of quantized weights only FP8 in blocks is read, with "
                "weight_block_size and weight_scale_inv; prune the bf16 model"
            )
        for key, most in _MOST.items():
            count = checkpoint.config.get(key)
            if isinstance(count, int) and count > most:
                raise BadInput(
                    f"{where}: {key} is more than {most:,}, which no model has; the file is not to be trusted"
                )
        try:
            # A copy all through: transformers writes into what it is given, rope_scaling among the rest.
            plain = copy.deepcopy({k: v for k, v in checkpoint.config.items() if k != "quantization_config"})
            config = CONFIG_MAPPING[family.model_type].from_dict(plain)
            config._attn_implementation = ATTENTION
            if getattr(config, "use_bidirectional_attention", False):
                raise BadInput(f"{where}: use_bidirectional_attention is set; only causal models are pruned")
            model = cls(checkpoint, family, config)
            return model, model._shapes()
        except BadInput:
            raise
        except Exception as error:  # whatever transformers finds wrong with a config
            reason = " ".join(str(error).split())[:300]
            raise BadInput(f"{where}: transformers refuses it: {type(error).__name__}: {reason}") from error

    @property
    def extra_layers(self) -> range:
        """Layers on disk behind the last one, which predict further tokens and which transformers does not load."""
        count = self.checkpoint.config.get(self.family.extra_layers or "", 0)
        return range(self.layers, self.layers + (count if type(count) is int else 0))

    def notes(self) -> list[str]:
        """What a user should know of how this checkpoint is read and written, for the report."""
        found = []
        if (block := fp8_block(self.checkpoint.config)) is not None:
            found.append(
                f"weights in FP8 with a scale for each {block[0]} × {block[1]} were read and written as bfloat16"
            )
        extra = tuple(self._prefix(layer) for layer in self.extra_layers)
        if any(name.startswith(extra) for name in self.checkpoint.tensors):
            layers = ", ".join(str(layer) for layer in self.extra_layers)
            found.append(f"layer {layers} predicts further tokens and was not pruned: transformers does not run it")
        return found

    def parts(self, also: Sequence[str] = ()) -> list[int]:
        """Numbers of the decoder layers and, where `also` asks for them, of `EMBEDDINGS` and lm_head around them.

        Raises `BadInput` for a lm_head that is the table of embeddings.
        """
        if "lm_head" in also and self.config.tie_word_embeddings:
            raise BadInput(
                f"also: lm_head: {self.checkpoint.path} has it tied to the embeddings; ask for embeddings, "
                "which then prunes both"
            )
        before, behind = [EMBEDDINGS] * ("embeddings" in also), [self.layers] * ("lm_head" in also)
        return [*before, *range(self.layers), *behind]

    @property
    def scores_in_the_open(self) -> bool:
        """Whether attention has soft caps or sinks, so that its scores have to be computed in the open."""
        attention = self._bare_layer(0).get_submodule(self.plans(0)[0].module)
        return hasattr(attention, "sinks") or getattr(self.config, "attn_logit_softcapping", None) is not None

    def tensor_names(self, layer: int) -> list[str]:
        """On-disk names of everything in a decoder layer; behind the last one are the final norm and lm_head."""
        if layer == self.layers:
            return [self.family.norm, self.family.head]
        return [name for name in self.checkpoint.tensors if name.startswith(self._prefix(layer))]

    def plans(self, layer: int) -> tuple[BlockPlan, ...]:
        """The residual blocks of a decoder layer."""
        blocks, mixture = self.family.blocks, self.family.mixture
        return blocks if mixture is None or not self.is_mixture(layer) else (*blocks[:-1], mixture)

    def is_mixture(self, layer: int) -> bool:
        """Whether a decoder layer has experts that only some tokens go through."""
        if layer not in self._mixtures:
            last = self.family.blocks[-1].module
            self._mixtures[layer] = hasattr(self._bare_layer(layer).get_submodule(last), "experts")
        return self._mixtures[layer]

    def groups(self, layer: int) -> list[Group]:
        """The groups of matrices of a decoder layer, in the order of the data's way."""
        kind = self.is_mixture(layer)
        if kind not in self._groups:
            self._groups[kind] = self._find_groups(self.plans(layer), self._layer(layer))
        return self._groups[kind]

    def matrices(self, layer: int) -> list[Matrix]:
        """The matrices of a decoder layer that can be pruned, in the data's order, or of another of `parts`."""
        found = []
        if not 0 <= layer < self.layers:
            info = self.checkpoint.tensors[self.family.embedding if layer == EMBEDDINGS else self.family.head]
            module = info.name.removesuffix(".weight").rpartition(".")[2]
            rows, columns = info.shape
            return [Matrix(layer, Group(0, 0, (module,)), module, info.name, rows, columns, info.dtype, info.name)]
        for group in self.groups(layer):
            for module in group.modules:
                stacked = self._stacked(layer, group, module)
                info = self.checkpoint.tensors[stacked or f"{self._prefix(layer)}{module}.weight"]
                rows, columns = info.shape[:0:-1] if stacked else info.shape
                name = f"{stacked}[{group.expert}]" if stacked else info.name
                found.append(Matrix(layer, group, module, name, rows, columns, info.dtype, info.name))
        return found

    def prunable(self, also: Sequence[str] = ()) -> Iterator[Matrix]:
        """The matrices of all `parts`; the same errors."""
        return itertools.chain.from_iterable(map(self.matrices, self.parts(also)))

    def _stacked(self, layer: int, group: Group, module: str) -> str | None:
        """The tensor that an expert's matrix is stacked in, if it is."""
        experts = self.plans(layer)[group.block].experts
        if experts is None or not experts.stacked or group.expert is None:
            return None
        home, _, part = module.rpartition(f".{group.expert}.")
        return f"{self._prefix(layer)}{home}.{part}"

    def build_layer(self, layer: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> list[Block]:
        """The residual blocks of a decoder layer with weights from `tensors` (by on-disk names)."""
        if layer == self.layers:
            return [self._head(tensors, dtype, device)]
        bare = self._layer(layer)
        prefix = self._prefix(layer)
        state = {}
        for name, tensor in tensors.items():
            inside = self.family.in_module(name.removeprefix(prefix))
            own = torch.float32 if self._stays_fp32(inside, dtype) else dtype
            state.update(self._unstacked(layer, inside, tensor.to(device, own, non_blocking=True)))
        bare.load_state_dict(state, assign=True)
        bare.requires_grad_(False).eval()
        rotary = functools.partial(self._positions, layer=layer)
        scale = self.family.residual_scale(self.config)
        groups = self.groups(layer)
        return [
            Block(bare, plan, [group for group in groups if group.block == number], self.family, rotary, scale)
            for number, plan in enumerate(self.plans(layer))
        ]

    def _head(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> Head:
        plan = self.plans(0)[0]
        norm = self._bare_layer(0).get_submodule(plan.norm or plan.after or "")  # the final one is of the same class
        own = torch.float32 if self._stays_fp32("norm", dtype) else dtype
        norm.load_state_dict({"weight": tensors[self.family.norm].to(device, own)}, assign=True)
        (matrix,) = self.matrices(self.layers)
        return Head(norm.requires_grad_(False).eval(), matrix.group)

    def embedding(self) -> Tensor:
        """The table of embeddings [size, hidden], read from the checkpoint."""
        return self.checkpoint.read(self.family.embedding)

    def embed(self, token_ids: Tensor, dtype: torch.dtype, table: Tensor) -> Tensor:
        """Embeddings [tokens, hidden] of token ids [tokens], from the `table` that `embedding` gives."""
        size = len(table)
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < size:
            raise BadInput(
                f"calibration: token ids from {int(token_ids.min())} to {int(token_ids.max())}, but the model has "
                f"{size} tokens; were the traces made by another model?"
            )
        embedded = F.embedding(token_ids, table).to(dtype)
        scale = self.family.embedding_scale(self.config, dtype)
        return embedded if scale == 1 else embedded.mul_(scale)

    def _prefix(self, layer: int) -> str:
        return f"{self.family.layers}{layer}."

    def _bare_layer(self, layer: int) -> nn.Module:
        """The layer as transformers builds it, without weights."""
        with torch.device("meta"):
            return self.family.make("DecoderLayer", self.config, layer)

    def _layer(self, layer: int) -> nn.Module:
        """The same with every expert as a module of its own."""
        bare = self._bare_layer(layer)
        for plan in self.plans(layer):
            if plan.experts is not None:
                home = bare.get_submodule(plan.module)
                home.add_module("experts", Mixture(home.get_submodule("experts"), plan.experts))
        return bare

    def _unstacked(self, layer: int, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """A tensor as the layer's modules know it: of stacked experts, a matrix or bias for each."""
        for plan in self.plans(layer):
            home, _, part = name.rpartition(".")
            if plan.experts is not None and plan.experts.stacked and home == f"{plan.module}.experts":
                if part.endswith("_bias"):
                    return {f"{home}.{e}.{part.removesuffix('_bias')}.bias": bias for e, bias in enumerate(tensor)}
                return {f"{home}.{e}.{part}.weight": matrix.T for e, matrix in enumerate(tensor)}
        return {name: tensor}

    def _find_groups(self, plans: tuple[BlockPlan, ...], layer: nn.Module) -> list[Group]:
        linears = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        found: list[Group] = []
        for block, plan in enumerate(plans):
            stages: list[list[tuple[tuple[str, ...], int | None]]] = [[(plan.inputs, None)]]
            if plan.between:
                stages.append([((name,), None) for name in plan.between])
            stages.append([((plan.output,), None)])
            experts = 0
            if plan.experts is not None:
                for number, parts in ((0, plan.experts.inputs), (-1, (plan.experts.output,))):
                    experts = len(cast(Mixture, layer.get_submodule(f"{plan.module}.experts")))
                    stages[number] += [(tuple(f"experts.{e}.{part}" for part in parts), e) for e in range(experts)]
            for stage in stages:
                number = found[-1].stage + 1 if found else 0
                for names, expert in stage:
                    here = [f"{plan.module}.{name}" for name in names if f"{plan.module}.{name}" in linears]
                    if here:
                        modules = tuple(self.family.on_disk(name) for name in here)
                        share = 1.0 if expert is None else self._routed / experts
                        found.append(Group(block, number, modules, expert, share))
        return found

    def _stays_fp32(self, name: str, dtype: torch.dtype) -> bool:
        """Whether transformers keeps this tensor of a layer in fp32 in a model of that dtype."""
        kept = set(self._pretrained._keep_in_fp32_modules_strict or ())
        if dtype == torch.float16:
            kept |= set(self._pretrained._keep_in_fp32_modules or ())
        return dtype != torch.float32 and not kept.isdisjoint(name.split("."))

    def _positions(self, x: Tensor, chunk: Chunk, layer: int) -> Any:
        """Rotary embeddings of a chunk: positions start at 0 in every sequence."""
        rotary, rope = self._rotary.to(x.device), self.config.rope_parameters or {}
        which = [self.config.layer_types[layer]] if self.family.rotary_by_layer_type else []
        part = slice(chunk.offset, chunk.offset + chunk.stop - chunk.start)
        ranges = [torch.arange(length, device=x.device)[None] for length in chunk.lengths]
        if functools.reduce(dict.__getitem__, which, rope).get("rope_type") in ("dynamic", "longrope"):
            # Frequencies depend on the sequence's length: every sequence asks for its own.
            parts = [rotary(x, positions, *which) for positions in ranges]
            return tuple(torch.cat(each, dim=1)[:, part] for each in zip(*parts, strict=True))
        return rotary(x, torch.cat(ranges, dim=1)[:, part], *which)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the config calls for, by their on-disk names."""
        table = (self.config.vocab_size, self.config.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {self.family.embedding: table, self.family.norm: table[1:]}
        if not self.config.tie_word_embeddings:
            shapes[self.family.head] = table
        kinds: dict[bool, dict[str, tuple[int, ...]]] = {}
        for index in range(self.layers):
            kind = self.is_mixture(index)
            if kind not in kinds:
                stacked = any(plan.experts is not None and plan.experts.stacked for plan in self.plans(index))
                state = (self._bare_layer(index) if stacked else self._layer(index)).state_dict()
                kinds[kind] = {self.family.on_disk(name): tuple(tensor.shape) for name, tensor in state.items()}
            shapes.update({self._prefix(index) + name: shape for name, shape in kinds[kind].items()})
        return shapes

    def _check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor that the config calls for is there in its shape, and no other."""
        where, have = self.checkpoint.path, self.checkpoint.tensors
        for name, shape in shapes.items():
            if name not in have:
                raise BadInput(f"{where}: tensor {name!r} is missing; the checkpoint does not fit its config.json")
            if have[name].shape != shape:
                raise BadInput(f"{where}: tensor {name!r} has shape {have[name].shape}, config.json says {shape}")
            if not have[name].dtype.is_floating_point or have[name].dtype.itemsize < 2:
                raise BadInput(f"{where}: tensor {name!r} is {have[name].dtype}; only bf16, fp16 and fp32 are pruned")
        extra = tuple(self._prefix(layer) for layer in self.extra_layers)
        for name in have:
            if name.startswith(self.family.layers) and name not in shapes and not name.startswith(extra):
                raise BadInput(f"{where}: tensor {name!r} is not part of this {self.family.model_type} model")


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    lengths: Sequence[int],
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of sequences that lie behind one another, none of which sees another.

    query [1, heads, tokens, d], key [1, key-value heads, tokens, d], value [1, key-value heads, tokens, e], `lengths`
    adding up to tokens; fewer queries than keys are the last tokens of one sequence. `softcap` bounds the scores by
    softcap · tanh(score / softcap); `s_aux` [heads] are sinks, scores of a token that is always seen and has the value
    0. Exact: runs of sequences of equal length are one batch, nothing is padded; the scores of all queries and keys
    never exist together (see `attention_bytes`). Returns [1, tokens, heads, e] as
    transformers' attention functions do.
    """
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
    whole = key.shape[2] == query.shape[2]
    for start, length, count in _runs(lengths):
        q, k, v = (_unpack(x, start, length, count) if whole else x for x in (query, key, value))
        if softcap is None and s_aux is None and is_fused(q.device, q.dtype, q.shape[3], _within(sliding_window, k)):
            attended = _causal(q, k, v, scaling, sliding_window)
        else:
            attended = _causal_in_the_open(q, k, v, scaling, sliding_window, softcap, s_aux)
        out[0, start : start + length * count] = attended.transpose(1, 2).flatten(0, 1)
    return out, None


def is_fused(device: torch.device, dtype: torch.dtype, width: int, window: int | None) -> bool:
    """Whether PyTorch has a kernel for causal attention, without soft caps and sinks, that holds no scores.

    A GPU's knows neither masks, which a `window` needs, nor fp32 with fewer keys than queries.
    """
    return device.type == "cpu" or (window is None and dtype.itemsize == 2 and width <= _FUSED_WIDTH)


def attention_bytes(
    fused: bool, group: int, widths: int, tokens: int, length: int, window: int | None, masked: bool, size: int
) -> int:
    """Bytes that exist within `packed_attention` at most, beside its arguments and what it returns.

    Of `tokens` queries in sequences of up to `length` tokens, `group` query heads to a key, `widths` being those of a
    key and a value together; `masked` where a fused kernel is given a mask, in numbers of `size` bytes.
    """
    if fused:
        # As bool and as the kernel takes it, or as bool and what it is made of.
        rows = _mask_rows(length, window) if masked else 0
        return max(1 + size, 3) * rows * _keys(rows, length, window)
    rows = _score_rows(group, tokens, length, window, 4)
    keys = _keys(rows, length, window)
    scores = min(rows * keys, _SCORE_BYTES // 4 // group)
    # Scores and shares in fp32, the mask; and of a head, keys and values, queries and what they get.
    return scores * (8 * group + 3) + 4 * widths * (max(keys, min(tokens, length)) + rows * group)


def _runs(lengths: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Start, length and count of each run of sequences of equal length."""
    start, first = 0, 0
    for at in range(1, len(lengths) + 1):
        if at == len(lengths) or lengths[at] != lengths[first]:
            yield start, lengths[first], at - first
            start += lengths[first] * (at - first)
            first = at


def _unpack(x: Tensor, start: int, length: int, count: int) -> Tensor:
    """[1, heads, tokens, d] → [count, heads, length, d]"""
    return x[0, :, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """[count, heads, queries, e] from q [count, heads, queries, d], k and v with the key-value heads.

    The queries are the last of the tokens that have keys.
    """
    width = v.shape[3]
    if width < q.shape[3]:
        # PyTorch's fast kernels want one width; columns of zeros change nothing.
        v = F.pad(v, (0, q.shape[3] - width))
    queries, length = q.shape[2], k.shape[2]
    options: dict[str, Any] = {"scale": scaling, "enable_gqa": True}
    window = _within(window, k)
    if window is None and queries == length:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)[..., :width]
    if window is None and q.is_cuda:
        # Flash attention knows this form, and no mask exists.
        bias: Any = causal_lower_right(queries, length)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, **options)[..., :width]
    out = torch.empty_like(q)
    for rows, columns, seen in _blocks(queries, length, _mask_rows(length, window), window, q.device):
        here = (q[:, :, rows], k[:, :, columns], v[:, :, columns])
        out[:, :, rows] = F.scaled_dot_product_attention(*here, attn_mask=seen, **options)
    return out[..., :width]


def _causal_in_the_open(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """As `_causal`, of what PyTorch's kernels do not know, soft caps and sinks, or would do with all scores at once.

    Of a key's head after the other, and of some queries at a time; scores in fp32 or better.
    """
    count, heads, queries, _ = q.shape
    group, window = heads // k.shape[1], _within(window, k)
    size = torch.promote_types(q.dtype, torch.float32).itemsize
    step = _score_rows(count * group, queries, k.shape[2], window, size)
    out = q.new_empty(count, heads, queries, v.shape[3])
    for rows, columns, seen in _blocks(queries, k.shape[2], step, window, q.device):
        for head in range(k.shape[1]):
            own, theirs = slice(head * group, (head + 1) * group), slice(head, head + 1)
            here = (q[:, own, rows], k[:, theirs, columns], v[:, theirs, columns])
            out[:, own, rows] = attend_in_the_open(*here, seen, scaling, softcap, None if sinks is None else sinks[own])
    return out


def _within(window: int | None, k: Tensor) -> int | None:
    """The window, unless all keys [count, heads, keys, d] are within it."""
    return None if window is None or k.shape[2] <= window else window


def _keys(rows: int, length: int, window: int | None) -> int:
    """How many keys so many queries in a row see, of a sequence of `length` tokens."""
    return length if window is None else min(length, window + rows)


def _mask_rows(length: int, window: int | None) -> int:
    """Queries that a mask is made for at a time."""
    return max(min(_QUERY_BLOCK, length, _MASK_BYTES // (4 * _keys(_QUERY_BLOCK, length, window))), 1)


def _score_rows(heads: int, queries: int, length: int, window: int | None, size: int) -> int:
    """Queries of so many heads whose scores, of `size` bytes, are made at a time."""
    most = _SCORE_BYTES // (heads * size)
    rows = most // length
    if window is not None:
        rows = max(rows, int((math.sqrt(window**2 + 4 * most) - window) / 2))  # rows · (window + rows) of them
    return max(min(rows, queries), 1)


def attend_in_the_open(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of q [count, heads, queries, d] on k, v [count, key-value heads, keys, d], all scores at once.

    `seen`, bool, is which keys each query sees, and is broadcast to [count, 1, 1, queries, keys]; `softcap` and `sinks`
    as in `packed_attention`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = (k.shape[1], q.shape[1] // k.shape[1])
    keys, values = (x.to(dtype)[:, :, None] for x in (k, v))
    scores = ((q.to(dtype) * scaling).unflatten(1, groups)) @ keys.mT
    if softcap is not None:
        scores = scores.div_(softcap).tanh_() * softcap  # gradients need what tanh gave
    scores.masked_fill_(~seen, -torch.inf)
    if sinks is None:
        shares = scores.softmax(-1)
    else:
        sink = sinks.to(dtype).view(1, *groups, 1, 1)
        top = torch.maximum(scores.detach().amax(-1, keepdim=True), sink)
        shares = scores.sub_(top).exp_()
        shares = shares / (shares.sum(-1, keepdim=True) + (sink - top).exp())
    return (shares @ values).flatten(1, 2).to(q.dtype)


def _blocks(
    queries: int, length: int, step: int, window: int | None, device: torch.device
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows of queries, at most `step` at a time, the keys that any of them sees, and which each sees [rows, keys]."""
    offset = length - queries
    for at in range(0, queries, step):
        to = min(at + step, queries)
        first = 0 if window is None else max(offset + at - window + 1, 0)
        own = torch.arange(offset + at, offset + to, device=device)[:, None]
        others = torch.arange(first, offset + to, device=device)
        seen = others <= own if window is None else (others <= own) & (others > own - window)
        yield slice(at, to), slice(first, offset + to), seen


def working_dtype(dtype: torch.dtype, on_gpu: bool) -> torch.dtype:
    """What a model of that dtype goes through in: fp32 where the processor has no quick products of 16-bit numbers.

    Without AVX-512 (or AMX, or Arm's) PyTorch multiplies bf16 element by element: a product of 400 × 288 × 768 was
    measured to take 7 times as long as in fp32, one of 1536³ 56 times.
    """
    known = torch.ops.mkldnn
    quick = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(dtype)
    if on_gpu or quick is None or not hasattr(known, quick) or getattr(known, quick)():
        return dtype
    return torch.float32


def _compute_dtype(checkpoint: Checkpoint, family: Family) -> torch.dtype:
    """The dtype that transformers would load the checkpoint in: the config's, else the embedding's."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return dtype
    info = checkpoint.tensors.get(family.embedding)
    return torch.float32 if info is None else info.dtype


AttentionInterface.register(ATTENTION, packed_attention)
