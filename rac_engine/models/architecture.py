"""The make-up of a model's decoder layers, by its family and config alone, without weights.

A decoder layer is a row of residual blocks, hidden + scale · after(output(inner(norm(hidden)))): attention and MLP. The
matrices at the entrance of `inner` (q, k, v; gate, up) share one input, the matrix `output` (o; down) has an input of
its own: taken apart there, a layer can be calibrated and pruned stage by stage.

Of a mixture of experts, transformers holds the experts' weights in fused tensors; on disk every expert has matrices of
its own. Here they are modules of their own again (`Mixture`), in place of the fused ones: the router and all around it
stay transformers'.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from rac_engine.models.chunk import Chunk
from rac_engine.models.experts import Mixture
from rac_engine.models.matrices import Group, find_groups
from rac_engine.models.plans import BlockPlan, Family


@dataclass(frozen=True)
class _Kind:
    """A kind of decoder layer: its blocks, and the names and shapes of its tensors as transformers has them."""

    plans: tuple[BlockPlan, ...]
    shapes: tuple[tuple[str, tuple[int, ...]], ...]


class Architecture:
    """The decoder layers of a model: their blocks, groups of matrices, and the shapes of their tensors."""

    def __init__(self, family: Family, config: Any) -> None:
        self.family, self.config = family, config
        self.layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        per_token = getattr(config, "num_experts_per_tok", 0)
        self._experts_per_token: int = max(per_token) if isinstance(per_token, list) else per_token
        self._pretrained = family.find("PreTrainedModel")
        rotary = family.rotary if family.has_positions(config) else None
        self._rotary = None if rotary is None else family.make(rotary, config)
        self._kinds: dict[int, int] = {}
        self._alike: list[_Kind] = []
        self._groups: dict[int, list[Group]] = {}

    @property
    def needs_eager_attention(self) -> bool:
        """Whether attention has soft caps or sinks, so that no fused kernel can compute it."""
        attention = next((mixer for plan, mixer in self.mixers() if plan.attention), None)
        capped = getattr(self.config, "attn_logit_softcapping", None) is not None
        return attention is not None and (capped or hasattr(attention, "sinks"))

    def mixers(self) -> Iterator[tuple[BlockPlan, nn.Module]]:
        """The attentions and recurrent mixers of the first layer of each kind, without weights."""
        for layer in self.first_layers():
            for plan in self.plans(layer):
                if plan.mixes:
                    yield plan, self._bare_layer(layer).get_submodule(plan.module)

    def plans(self, layer: int) -> tuple[BlockPlan, ...]:
        """The residual blocks of a decoder layer."""
        return self._alike[self.kind(layer)].plans

    def is_mixture(self, layer: int) -> bool:
        """Whether a decoder layer has experts that only some tokens go through."""
        return any(plan.experts is not None for plan in self.plans(layer))

    def kind(self, layer: int) -> int:
        """Number of a decoder layer's kind: layers of one kind have the same blocks and tensors of the same shapes."""
        if layer not in self._kinds:
            bare = self._bare_layer(layer)
            shapes = tuple((name, tuple(tensor.shape)) for name, tensor in bare.state_dict().items())
            found = _Kind(self.family.within(bare), shapes)
            if found not in self._alike:
                self._alike.append(found)
            self._kinds[layer] = self._alike.index(found)
        return self._kinds[layer]

    def first_layers(self) -> list[int]:
        """Number of the first decoder layer of each kind."""
        first: dict[int, int] = {}
        for layer in range(self.layers):
            first.setdefault(self.kind(layer), layer)
        return list(first.values())

    def groups(self, layer: int) -> list[Group]:
        """The groups of matrices of a decoder layer that share an input, in the order that data goes through them."""
        kind = self.kind(layer)
        if kind not in self._groups:
            self._groups[kind] = find_groups(
                self.family, self.plans(layer), self._layer(layer), self._experts_per_token
            )
        return self._groups[kind]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the config calls for, by their on-disk names."""
        table = (self.config.vocab_size, self.config.hidden_size)
        shapes: dict[str, tuple[int, ...]] = {
            self.family.embedding: table,
            **dict.fromkeys(self.norm_names(), table[1:]),
        }
        if not self.config.tie_word_embeddings:
            shapes[self.family.head] = table
        kinds: dict[int, dict[str, tuple[int, ...]]] = {}
        for index in range(self.layers):
            kind = self.kind(index)
            if kind not in kinds:
                layer = self._layer(index)
                state = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
                for plan in self.plans(index):
                    if plan.experts is not None and plan.experts.stacked:
                        home = f"{plan.module}.experts"
                        state = {name: shape for name, shape in state.items() if not name.startswith(f"{home}.")}
                        stacked = cast(Mixture, layer.get_submodule(home)).stacked_shapes()
                        state |= {f"{home}.{name}": shape for name, shape in stacked.items()}
                kinds[kind] = {self.family.on_disk(name): shape for name, shape in state.items()}
            shapes.update({self._prefix(index) + name: shape for name, shape in kinds[kind].items()})
        return shapes

    def norm_names(self) -> list[str]:
        """On-disk names of the final norm's tensors: its weight and, of some families, a bias."""
        return [self.family.norm.removesuffix("weight") + part for part in self._final_norm().state_dict()]

    def _final_norm(self) -> nn.Module:
        """The final norm without weights: of the same class as those in the layers."""
        plan = self.plans(0)[0]
        return self._bare_layer(0).get_submodule(plan.norm or plan.after or "")

    def _prefix(self, layer: int) -> str:
        return f"{self.family.layers}{layer}."

    def _bare_layer(self, layer: int) -> nn.Module:
        """The layer as transformers builds it, without weights."""
        made = self.family.find(self.family.layer)
        asked = inspect.signature(made).parameters
        kind = {"layer_type": self.config.layer_types[layer]} if "layer_type" in asked else {}
        with torch.device("meta"):
            return cast(nn.Module, made(self.config, layer, **kind))

    def _layer(self, layer: int) -> nn.Module:
        """The layer without weights, every expert a module of its own."""
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
                transposed = plan.experts.transposed
                each = (matrix.T if transposed else matrix for matrix in tensor)
                return {f"{home}.{e}.{part}.weight": matrix for e, matrix in enumerate(each)}
        return {name: tensor}

    def _stays_fp32(self, name: str, dtype: torch.dtype) -> bool:
        """Whether transformers keeps this tensor of a layer in fp32 in a model of that dtype."""
        kept = {*self.family.fp32, *(self._pretrained._keep_in_fp32_modules_strict or ())}
        if dtype == torch.float16:
            kept |= set(self._pretrained._keep_in_fp32_modules or ())
        return dtype != torch.float32 and any(part in name for part in kept)

    def _positions(self, x: Tensor, chunk: Chunk, layer: int) -> Any:
        """Rotary embeddings of a chunk: positions start at 0 in every sequence."""
        if self._rotary is None:
            return None
        rotary, rope = self._rotary.to(x.device), self.config.rope_parameters or {}
        which = [self.config.layer_types[layer]] if self.family.rotary_by_layer_type else []
        if functools.reduce(dict.__getitem__, which, rope).get("rope_type") in ("dynamic", "longrope"):
            # Frequencies depend on the sequence's length: every sequence asks for its own.
            part = slice(chunk.offset, chunk.offset + chunk.stop - chunk.start)
            parts = [rotary(x, torch.arange(length, device=x.device)[None], *which) for length in chunk.lengths]
            return tuple(torch.cat(each, dim=1)[:, part] for each in zip(*parts, strict=True))
        return rotary(x, chunk.positions(x.device)[None], *which)
