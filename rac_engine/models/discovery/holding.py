"""A discovered family held against transformers: the engine's blocks give the small model's own hidden states."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rac_engine.models.block import Block
from rac_engine.models.chunk import Chunk
from rac_engine.models.discovery.discover import Discovered
from rac_engine.models.discovery.small import Unfit
from rac_engine.models.discovery.tracing import Trace
from rac_engine.models.matrices import Group

ROUNDING = 2e-5  # relative, a token: what sums of fp32 in another order may differ by

HELD = 1e-6  # of the hidden states that a layer adds to

PART = 16  # tokens of the first part of a sequence that comes in two


class Layers(Protocol):
    """The engine's own model of a family and config."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the config calls for, by their on-disk names."""

    def groups(self, layer: int) -> list[Group]:
        """The groups of matrices of a decoder layer that share an input."""

    def build_layer(self, layer: int, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str) -> list[Block]:
        """The residual blocks of a decoder layer with weights from `tensors` (by on-disk names)."""

    def embed(self, token_ids: Tensor, dtype: torch.dtype, table: Tensor) -> Tensor:
        """Embeddings [tokens, hidden] of token ids [tokens]."""


def hold(found: Discovered, layers: Layers) -> None:
    """Hold what every layer makes of its input, and the input of every matrix, against transformers' forward pass.

    Every layer is given what transformers gave it: the sequences packed behind one another, and the first once more in
    two parts. Raises `Unfit` where anything differs by more than rounding, and where a block does not run by itself.
    """
    try:
        _hold(found, layers)
    except Unfit:
        raise
    except Exception as error:  # of a module that asks for what only its whole model has
        reason = " ".join(str(error).split())[:200]
        raise Unfit(f"its blocks do not run by themselves: {type(error).__name__}: {reason}") from error


@torch.no_grad()
def _hold(found: Discovered, layers: Layers) -> None:
    shapes = layers.shapes()
    have = {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}
    if wrong := [name for name, shape in shapes.items() if have.get(name) != shape]:
        raise Unfit(f"tensor {wrong[0]} is not among those that transformers would write")
    groups = {name for number in range(len(found.traces[0].layers)) for name in _plain_matrices(found, layers, number)}
    if wrong := sorted(groups - have.keys()):
        raise Unfit(f"matrix {wrong[0]} is not among those that transformers would write")
    if left := [name for name in have if name.startswith(found.family.layers) and name not in shapes]:
        raise Unfit(f"tensor {left[0]} belongs to no block that was found")
    table = found.tensors[found.family.embedding]
    embedded = layers.embed(torch.cat(found.sequences), torch.float32, table)
    if _difference(embedded, torch.cat([each.layers[0].given[0] for each in found.traces])) > ROUNDING:
        raise Unfit("its first layer is not given what the engine makes of the embeddings")
    lengths = tuple(len(ids) for ids in found.sequences)
    whole = [Chunk(0, sum(lengths), lengths)]
    parts = [Chunk(0, PART, lengths[:1]), Chunk(PART, lengths[0], lengths[:1], PART)]
    for number in range(len(found.traces[0].layers)):
        begin = f"{found.family.layers}{number}."
        tensors = {name: tensor for name, tensor in found.tensors.items() if name.startswith(begin)}
        given, wanted = (
            torch.cat([getattr(each.layers[number], what)[0] for each in found.traces]) for what in ("given", "result")
        )
        packed, parted = given, given[: lengths[0]]
        for block in layers.build_layer(number, tensors, torch.float32, "cpu"):
            inputs: dict[str, Tensor] = {}
            packed = _through(block, packed, whole, inputs)
            _hold_inputs(found, number, block, inputs)
            parted = _through(block, parted, parts, {})
        _hold_dtype(found, layers, number, given, whole)
        most = ROUNDING * (wanted - given).norm(dim=1) + HELD * wanted.norm(dim=1)
        for hidden in (packed, parted):
            off = (hidden - wanted[: len(hidden)]).norm(dim=1)
            if not bool((off <= most[: len(hidden)]).all()):
                raise Unfit(
                    f"taken apart into blocks, layer {number} gives hidden states that differ from those of "
                    f"transformers by {float(off.max()):.1e}"
                )


def _plain_matrices(found: Discovered, layers: Layers, number: int) -> list[str]:
    """Names on disk of a layer's matrices that are no expert's."""
    groups = [group for group in layers.groups(number) if group.expert is None]
    return [f"{found.family.layers}{number}.{module}.weight" for group in groups for module in group.modules]


def _hold_dtype(found: Discovered, layers: Layers, number: int, given: Tensor, chunks: Sequence[Chunk]) -> None:
    """Hold that a layer runs in bf16, in which some of its tensors may have to stay fp32."""
    begin = f"{found.family.layers}{number}."
    tensors = {name: tensor for name, tensor in found.tensors.items() if name.startswith(begin)}
    hidden = given.bfloat16()
    for block in layers.build_layer(number, tensors, torch.bfloat16, "cpu"):
        hidden = _through(block, hidden, chunks, {})
    if hidden.dtype != torch.bfloat16 or not bool(hidden.isfinite().all()):
        raise Unfit(f"layer {number} does not run in bf16")


def _through(block: Block, hidden: Tensor, chunks: Sequence[Chunk], inputs: dict[str, Tensor]) -> Tensor:
    """The hidden states behind a block; `inputs` takes what its matrices were given, but for experts."""

    def observer(name: str) -> Callable[[Tensor, Tensor | None], None]:
        return lambda x, tokens: inputs.update({name: x.clone()})

    names = [group.input for group in block.groups if group.expert is None]
    made = []
    for chunk in chunks:
        part = hidden[chunk.start : chunk.stop]
        made.append(block.finish(part, block.inner(block.norm(part), chunk, {name: observer(name) for name in names})))
    return torch.cat(made)


def _hold_inputs(found: Discovered, number: int, block: Block, inputs: Mapping[str, Tensor]) -> None:
    """Hold what each matrix was given against what it was given in transformers' own forward pass."""
    for group in block.groups:
        if group.expert is not None:
            continue
        for name in group.modules:
            wanted = [_given(each, number, found.family.in_module(name)) for each in found.traces]
            if _difference(inputs[group.input], torch.cat(wanted)) > ROUNDING:
                raise Unfit(f"{name} of layer {number} has another input in its blocks than in transformers")


def _given(trace: Trace, number: int, name: str) -> Tensor:
    call = next(call for call in trace.inside[number] if call.name == name)
    return call.given.flatten(0, -2)


def _difference(found: Tensor, wanted: Tensor) -> float:
    """The largest relative difference of a token's vector; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    length = wanted.norm(dim=1).clamp_min(1e-30)
    return float(((found - wanted).norm(dim=1) / length).nan_to_num(float("inf")).max())
