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
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint import Checkpoint, TensorInfo, fp8_block
from rac_engine.models.attention import ATTENTION
from rac_engine.models.block import Block, Head
from rac_engine.models.dtypes import compute_dtype
from rac_engine.models.experts import Mixture
from rac_engine.models.families import FAMILIES
from rac_engine.models.matrices import EMBEDDINGS, Group, Matrix
from rac_engine.models.plans import BlockPlan, Family
from rac_engine.models.taps import Chunk

# What transformers makes lists of: a config that asks for more than any model has would be obeyed for days.
_MOST = {
    "num_hidden_layers": 10_000,
    "num_nextn_predict_layers": 10_000,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"), 100_000),
}

_MOST_ANGLES = 1 << 20  # of rotary embeddings, which are computed as soon as a model is opened


class Model:
    """A checkpoint of a known family, taken apart into embedding and decoder layers. Made by `open`."""

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Any) -> None:
        self.checkpoint, self.family, self.config = checkpoint, family, config
        self.layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        self.dtype = compute_dtype(checkpoint, family)
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
