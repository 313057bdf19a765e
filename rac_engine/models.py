"""What a decoder layer is in each model family, on transformers' own modules.

A decoder layer is a row of residual blocks, hidden + output(inner(norm(hidden))): attention and MLP. The matrices at
the entrance of `inner` (q, k, v; gate, up) share one input, the matrix `output` (o; down) has an input of its own:
taken apart there, a layer can be calibrated and pruned stage by stage. Layers are built on the meta device and filled
with tensors by their on-disk names, so no more than a layer's weights need to be in memory.

To add a family, describe it in `FAMILIES`: its class names and its blocks. tests/engine/test_models.py holds every
family against transformers' own forward pass.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.checkpoint import Checkpoint
from rac_engine.errors import BadInput

ATTENTION = "rac_packed"
_QUERY_BLOCK = 1024  # rows of a sliding window's mask that exist at a time
_EMBEDDING_BYTES = 64 << 20  # of an embedding's rows that are in memory at a time


@dataclass(frozen=True)
class BlockPlan:
    """A residual block by the names of its parts within the layer."""

    module: str
    norm: str
    inputs: tuple[str, ...]
    output: str
    attention: bool = False


@dataclass(frozen=True)
class Family:
    """How transformers builds models of one `model_type`: class names start with `prefix`."""

    model_type: str
    prefix: str
    blocks: tuple[BlockPlan, ...]
    layers: str = "model.layers."
    embedding: str = "model.embed_tokens.weight"
    norm: str = "model.norm.weight"
    head: str = "lm_head.weight"

    def make(self, kind: str, *args: Any) -> nn.Module:
        """An instance of this family's class for `kind`, such as "DecoderLayer"."""
        home = importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")
        return getattr(home, self.prefix + kind)(*args)


PRE_NORM = (
    BlockPlan("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj"), "o_proj", attention=True),
    BlockPlan("mlp", "post_attention_layernorm", ("gate_proj", "up_proj"), "down_proj"),
)
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", PRE_NORM),
        Family("qwen2", "Qwen2", PRE_NORM),
        Family("qwen3", "Qwen3", PRE_NORM),
    )
}


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns] that can be pruned. Matrices of one `stage` of a layer share their input."""

    layer: int
    stage: int
    module: str
    """Name within the layer: `self_attn.q_proj`."""
    name: str
    """Name on disk: `model.layers.0.self_attn.q_proj.weight`."""
    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def path(self) -> str:
        """Name of the module in the whole model."""
        return self.name.removesuffix(".weight")


@dataclass(frozen=True)
class Chunk:
    """Whole sequences that lie behind one another: tokens `start` up to `stop`, of `lengths` each."""

    start: int
    stop: int
    lengths: tuple[int, ...]
    piece_tokens: int
    """Most tokens that go through a token-wise block together."""

    def pieces(self) -> list[slice]:
        """Slices of the chunk for blocks in which tokens do not see each other."""
        size = self.stop - self.start
        return [slice(at, min(at + self.piece_tokens, size)) for at in range(0, size, self.piece_tokens)]


class Block:
    """A residual block with its weights: `inner(norm(hidden))` is the input of `output`."""

    def __init__(self, layer: nn.Module, plan: BlockPlan, rotary: Callable[[Tensor, Chunk], Any]) -> None:
        self.plan = plan
        self.norm = layer.get_submodule(plan.norm)
        self._module = layer.get_submodule(plan.module)
        self.linears = {
            f"{plan.module}.{part}": self._module.get_submodule(part) for part in (*plan.inputs, plan.output)
        }
        """The block's matrices by their names within the layer."""
        self._output = self._module.get_submodule(plan.output)
        self.width = self._output.get_parameter("weight").shape[1]
        """Columns of the block's last matrix."""
        # The module's own forward then ends with what goes into its last matrix.
        setattr(self._module, plan.output, nn.Identity())
        self._rotary = rotary

    def slices(self, chunk: Chunk) -> list[slice]:
        """The parts of a chunk that go through this block one after another: an attention needs it whole."""
        return [slice(0, chunk.stop - chunk.start)] if self.plan.attention else chunk.pieces()

    def inner(self, x: Tensor, chunk: Chunk) -> Tensor:
        """The block's input x [tokens, hidden], normalised, to the input of `output` [tokens, its columns]."""
        if not self.plan.attention:
            return self._module(x[None])[0]
        rotary = self._rotary(x[None], chunk)
        return self._module(x[None], position_embeddings=rotary, attention_mask=None, lengths=chunk.lengths)[0][0]

    def leave(self, hidden: Tensor, inner: Tensor) -> Tensor:
        """What the block hands on [tokens, hidden], from what it was given and its `inner`."""
        return hidden + self._output(inner)


class Model:
    """A checkpoint of a known family, taken apart into embedding and decoder layers. Made by `open`."""

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Any) -> None:
        self.checkpoint, self.family, self.config = checkpoint, family, config
        self.layers: int = config.num_hidden_layers
        self.dtype = _compute_dtype(checkpoint, family)
        self._rotary = family.make("RotaryEmbedding", config)

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Model:
        """Raises `BadInput` for an unknown family and for tensors that do not fit the config."""
        where, kind = checkpoint.path / "config.json", checkpoint.config.get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None:
            raise BadInput(
                f"{where}: model_type {kind!r} is not known; known are {', '.join(sorted(FAMILIES))} "
                "(rac_engine/models.py says how to add one)"
            )
        if "quantization_config" in checkpoint.config:
            raise BadInput(f"{where}: the model is quantized; prune the model that it was made from")
        try:
            config = CONFIG_MAPPING[family.model_type].from_dict(dict(checkpoint.config))
            config._attn_implementation = ATTENTION
            model = cls(checkpoint, family, config)
            layer = model._bare_layer(0)
        except BadInput:
            raise
        except Exception as error:  # whatever transformers finds wrong with a config
            reason = " ".join(str(error).split())[:300]
            raise BadInput(f"{where}: transformers refuses it: {type(error).__name__}: {reason}") from error
        model._check(layer)
        return model

    def tensor_names(self, layer: int) -> list[str]:
        """On-disk names of everything in a decoder layer."""
        return [name for name in self.checkpoint.tensors if name.startswith(self._prefix(layer))]

    def matrices(self, layer: int) -> list[Matrix]:
        """The matrices of a decoder layer that can be pruned, in the order of the data's way."""
        found = []
        stages = [(block, group) for block in self.family.blocks for group in (block.inputs, (block.output,))]
        for stage, (block, group) in enumerate(stages):
            for part in group:
                module = f"{block.module}.{part}"
                info = self.checkpoint.tensors[f"{self._prefix(layer)}{module}.weight"]
                rows, columns = info.shape
                found.append(Matrix(layer, stage, module, info.name, rows, columns, info.dtype))
        return found

    def build_layer(self, layer: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> list[Block]:
        """The residual blocks of a decoder layer with weights from `tensors` (by on-disk names)."""
        bare = self._bare_layer(layer)
        prefix = self._prefix(layer)
        state = {name.removeprefix(prefix): tensor.to(device, dtype) for name, tensor in tensors.items()}
        bare.load_state_dict(state, assign=True)
        bare.requires_grad_(False).eval()
        return [Block(bare, plan, self._positions) for plan in self.family.blocks]

    def embed(self, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings [tokens, hidden] of token ids [tokens], reading the table a part at a time."""
        info = self.checkpoint.tensors[self.family.embedding]
        size, hidden = info.shape
        if token_ids.numel() and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < size:
            raise BadInput(
                f"calibration: token ids from {int(token_ids.min())} to {int(token_ids.max())}, but the model has "
                f"{size} tokens; were the traces made by another model?"
            )
        embedded = torch.empty(len(token_ids), hidden, dtype=dtype)
        step = max(_EMBEDDING_BYTES // (hidden * info.dtype.itemsize), 1)
        for first in range(0, size, step):
            table = self.checkpoint.read(info.name, rows=(first, min(first + step, size))).to(dtype)
            here = ((token_ids >= first) & (token_ids < first + len(table))).nonzero()[:, 0]
            embedded[here] = table[token_ids[here] - first]
        return embedded

    def _prefix(self, layer: int) -> str:
        return f"{self.family.layers}{layer}."

    def _bare_layer(self, layer: int) -> nn.Module:
        with torch.device("meta"):
            return self.family.make("DecoderLayer", self.config, layer)

    def _positions(self, x: Tensor, chunk: Chunk) -> Any:
        """Rotary embeddings of a chunk: positions start at 0 in every sequence."""
        rotary = self._rotary.to(x.device)
        ranges = [torch.arange(length, device=x.device)[None] for length in chunk.lengths]
        if (self.config.rope_parameters or {}).get("rope_type") in ("dynamic", "longrope"):
            # Frequencies depend on the sequence's length: every sequence asks for its own.
            parts = [rotary(x, positions) for positions in ranges]
            return tuple(torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return rotary(x, torch.cat(ranges, dim=1))

    def _check(self, layer: nn.Module) -> None:
        """Every tensor that the config calls for is there in its shape, and no other."""
        where, have = self.checkpoint.path, self.checkpoint.tensors
        shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
        hidden = self.config.hidden_size
        table = (self.config.vocab_size, hidden)
        expected = {self.family.embedding: table, self.family.norm: (hidden,)}
        if not self.config.tie_word_embeddings:
            expected[self.family.head] = table
        for index in range(self.layers):
            expected.update({self._prefix(index) + name: shape for name, shape in shapes.items()})
        for name, shape in expected.items():
            if name not in have:
                raise BadInput(f"{where}: tensor {name!r} is missing; the checkpoint does not fit its config.json")
            if have[name].shape != shape:
                raise BadInput(f"{where}: tensor {name!r} has shape {have[name].shape}, config.json says {shape}")
            if not have[name].dtype.is_floating_point or have[name].dtype.itemsize < 2:
                raise BadInput(f"{where}: tensor {name!r} is {have[name].dtype}; only bf16, fp16 and fp32 are pruned")
        for name in have:
            if name.startswith(self.family.layers) and name not in expected:
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
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of sequences that lie behind one another, none of which sees another.

    query [1, heads, tokens, d], key and value [1, key-value heads, tokens, d], `lengths` adding up to tokens. Exact:
    runs of sequences of equal length are one batch, nothing is padded. Returns [1, tokens, heads, d] as transformers'
    attention functions do.
    """
    out = torch.empty_like(query.transpose(1, 2))
    for start, length, count in _runs(lengths):
        q, k, v = (_unpack(x, start, length, count) for x in (query, key, value))
        attended = _causal(q, k, v, scaling, sliding_window)
        out[0, start : start + length * count] = attended.transpose(1, 2).flatten(0, 1)
    return out, None


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
    length = q.shape[2]
    if window is None or length <= window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    parts = []
    for at in range(0, length, _QUERY_BLOCK):
        to, first = min(at + _QUERY_BLOCK, length), max(at - window + 1, 0)
        distance = torch.arange(at, to, device=q.device)[:, None] - torch.arange(first, to, device=q.device)
        mask = (distance >= 0) & (distance < window)
        rows, columns = slice(at, to), slice(first, to)
        parts.append(
            F.scaled_dot_product_attention(
                q[:, :, rows], k[:, :, columns], v[:, :, columns], attn_mask=mask, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(parts, dim=2)


def _compute_dtype(checkpoint: Checkpoint, family: Family) -> torch.dtype:
    """The dtype that transformers would load the checkpoint in: the config's, else the embedding's."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return dtype
    info = checkpoint.tensors.get(family.embedding)
    return torch.float32 if info is None else info.dtype


AttentionInterface.register(ATTENTION, packed_attention)
