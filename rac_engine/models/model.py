"""A checkpoint of a known family, taken apart into embedding and decoder layers.

Layers are built from transformers' own modules on the meta device and filled with tensors by their on-disk names, so no
more than a layer's weights need to be in memory.

To add a family, add a file to rac_engine/models/families (docs/families.md is the page about it) and a config to
tests/tiny.py: the tests hold every family there against transformers' own forward pass.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rac_engine.base.errors import BadInput
from rac_engine.checkpoint import Checkpoint, TensorInfo, bytes_of, find_format
from rac_engine.models.architecture import Architecture
from rac_engine.models.block import Block, Head
from rac_engine.models.configs import accepted_family, parse_config, transformers_errors
from rac_engine.models.discovery.discover import discover
from rac_engine.models.discovery.holding import hold
from rac_engine.models.dtypes import compute_dtype
from rac_engine.models.matrices import EMBEDDINGS, Group, Matrix
from rac_engine.models.plans import Family
from rac_engine.models.readout import Readout

_COMPARED = 1024  # rows of a head and of embeddings that are read at a time, to tell whether they are the same

_COMPUTED = ".rotary_emb."  # stored by some checkpoints; what the config says is used, as transformers does

_FURTHER = "eh_proj.weight"  # what makes one of two vectors in a layer that predicts further tokens


class Model(Architecture):
    """The decoder layers of a checkpoint. Made by `open`."""

    def __init__(self, checkpoint: Checkpoint, family: Family, config: Any) -> None:
        super().__init__(family, config)
        self.checkpoint = checkpoint
        self.dtype = compute_dtype(checkpoint, family)
        self.untied = False
        """Whether a lm_head is stored that is not the embeddings it is tied to by the config, or by its default."""

    @classmethod
    def open(cls, checkpoint: Checkpoint) -> Model:
        """Raises `BadInput` for an unknown family and for tensors that do not fit the config."""
        model, shapes = cls._described(checkpoint)
        if model.config.tie_word_embeddings and model._has_own_head():
            model.config.tie_word_embeddings, model.untied = False, True
            shapes[model.family.head] = shapes[model.family.embedding]
        model._check(shapes)
        return model

    @classmethod
    def of_config(cls, path: Path, config: dict[str, Any]) -> Model:
        """The model that a config.json (in the folder `path`) describes, for planning: it has no weights to be read."""
        model, shapes = cls._described(Checkpoint(path, config, {}, {}))
        named = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16)
        model.dtype = named
        model.checkpoint.tensors.update(
            (name, TensorInfo(name, path, named, shape, 0, math.prod(shape) * named.itemsize))
            for name, shape in shapes.items()
        )
        return model

    @classmethod
    def _described(cls, checkpoint: Checkpoint) -> tuple[Model, dict[str, tuple[int, ...]]]:
        """The model, and the shapes of all tensors that its config calls for."""
        file = checkpoint.path / "config.json"
        family = accepted_family(file, checkpoint.config, _traced).as_stored(checkpoint.tensors)
        with transformers_errors(file):
            model = cls(checkpoint, family, parse_config(file, family, checkpoint.config))
            return model, model.shapes()

    @property
    def extra_layers(self) -> range:
        """Layers on disk behind the last one, which predict further tokens and which transformers does not load."""
        said, found = self.checkpoint.config.get(self.family.extra_layers or "", 0), 0
        while f"{self._prefix(self.layers + found)}{_FURTHER}" in self.checkpoint.tensors:  # said or not
            found += 1
        return range(self.layers, self.layers + max(said if type(said) is int else 0, found))

    def notes(self) -> list[str]:
        """Remarks for the report on how this checkpoint is read and written."""
        found = []
        if self.family.traced:
            found.append(
                f"no description names {self.family.model_type!r}: its blocks were found by tracing a small model of "
                "its config, and held against transformers"
            )
        if (form := find_format(self.checkpoint.config)) is not None:
            made = {str(info.dtype)[6:] for info in self.checkpoint.tensors.values() if info.quantized is not None}
            read = f"were read and written as {' and '.join(sorted(made))}" if made else "are none: all are plain"
            found.append(f"weights in {form.words} {read}")
        if (count := self.checkpoint.left_out) > 0:
            found.append(
                f"{count} scales of quantized activations and caches were left out: plain weights have no use for them"
            )
        if self.untied:
            found.append(
                f"{self.family.head} is not the table of embeddings that config.json ties it to: it was taken as a "
                "matrix of its own, as transformers does"
            )
        extra = tuple(self._prefix(layer) for layer in self.extra_layers)
        if any(name.startswith(extra) for name in self.checkpoint.tensors):
            layers = ", ".join(str(layer) for layer in self.extra_layers)
            found.append(f"layer {layers} predicts further tokens and was not pruned: transformers does not run it")
        for prefix in self.family.further:
            if any(name.startswith(prefix) for name in self.checkpoint.tensors):
                found.append(f"{prefix}* predicts further tokens and was not pruned: transformers does not run it")
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
    def tied_copies(self) -> tuple[str, ...]:
        """Name of a lm_head that is stored though it is tied, as a copy of the embeddings (small Qwen 3 have one).

        transformers ties them only while they are the same, so what becomes of one has to become of the other.
        """
        head = self.family.head
        return (head,) if self.config.tie_word_embeddings and head in self.checkpoint.tensors else ()

    def tensor_names(self, layer: int) -> list[str]:
        """On-disk names of everything in a decoder layer; behind the last one are the final norm and lm_head."""
        if layer == self.layers:
            return [*self.norm_names(), self.family.head]
        names = (name for name in self.checkpoint.tensors if name.startswith(self._prefix(layer)))
        return [name for name in names if _COMPUTED not in name]

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
                experts = self.plans(layer)[group.block].experts
                turned = stacked is not None and experts is not None and experts.transposed
                rows, columns = info.shape[-2:][:: -1 if turned else 1]
                name = f"{stacked}[{group.expert}]" if stacked else info.name
                found.append(Matrix(layer, group, module, name, rows, columns, info.dtype, info.name, turned))
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
        return self._prefix(layer) + self.family.on_disk(f"{home}.{part}")

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

    def readout(self, dtype: torch.dtype, device: str) -> Readout:
        """The final norm and lm_head as they are in the checkpoint."""
        names = self.norm_names()
        norm = self._filled_norm({name: self.checkpoint.read(name) for name in names}, dtype, device)
        tied = self.config.tie_word_embeddings
        head = self.embedding() if tied else self.checkpoint.read(self.family.head)
        name = self.family.head.removesuffix("weight") + "bias"
        bias = self.checkpoint.read(name).to(device, dtype) if name in self.checkpoint.tensors else None
        return Readout(norm, head.to(device, dtype), bias, self.config)

    def _head(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> Head:
        norm = self._filled_norm(tensors, dtype, device)
        (matrix,) = self.matrices(self.layers)
        return Head(norm, matrix.group)

    def _filled_norm(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> torch.nn.Module:
        """The final norm with its weights from `tensors` (by on-disk names)."""
        norm = self._final_norm()
        own = torch.float32 if self._stays_fp32("norm", dtype) else dtype
        state = {name.rpartition(".")[2]: tensors[name].to(device, own) for name in self.norm_names()}
        norm.load_state_dict(state, assign=True)
        return norm.requires_grad_(False).eval()

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

    def _has_own_head(self) -> bool:
        """Whether a lm_head is stored that is no copy of the embeddings."""
        names = (self.family.head, self.family.embedding)
        if not all(name in self.checkpoint.tensors for name in names):
            return False
        head, table = (self.checkpoint.tensors[name] for name in names)
        if (head.dtype, head.shape) != (table.dtype, table.shape) or len(head.shape) != 2:
            return True
        runs = ((first, min(first + _COMPARED, head.shape[0])) for first in range(0, head.shape[0], _COMPARED))
        pairs = ([bytes_of(self.checkpoint.read(name, run)) for name in names] for run in runs)
        return any(one != other for one, other in pairs)

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
            if name in shapes or name.startswith(extra) or _COMPUTED in name:
                continue
            if name.startswith(self.family.layers):
                raise BadInput(f"{where}: tensor {name!r} is not part of this {self.family.model_type} model")


def _traced(config: Mapping[str, Any]) -> Family:
    """The family of a config.json that no file describes. Raises `Unfit` where there is none to be found."""
    return _traced_once(json.dumps(config))


@functools.lru_cache(maxsize=8)
def _traced_once(config: str) -> Family:
    """Find the family of a config.json as text, and hold it against transformers."""
    found = discover(json.loads(config))
    hold(found, Model(Checkpoint(Path(), {}, {}, {}), found.family, found.config))
    return found.family
