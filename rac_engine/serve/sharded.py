"""Methods of linear layers and of others for vLLM, which cuts weights for its ranks and fuses them.

A layer's weights are packed as soon as they are read, so that a dense copy of the model is never in memory. How they
are cut for a rank and fused is left to vLLM's own loaders, which are given pieces of packed matrices for tensors. The
classes here know nothing of vLLM: `rac_engine.serve.vllm` puts them before its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rac_engine.serve.pieces import Piece, Place, is_packed
from rac_kernels import Packed, PackedLayout, packed_matmul, unpack


class PackedLinears:
    """A `LinearMethodBase` for packed matrices: q, k and v are one, and gate and up, where they are packed alike."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        *sizes: Any,
        **attributes: Any,
    ) -> None:
        """Give the layer an empty parameter, whose loader keeps pieces of what it is given.

        input_size_per_partition: columns of this rank; output_partition_sizes: rows of each of the matrices that are
        one here. Of `attributes` the weight_loader counts.
        """
        place = Place((0, sum(output_partition_sizes)), (0, input_size_per_partition))
        loader: Callable[..., None] = attributes["weight_loader"]

        def load(param: nn.Parameter, loaded_weight: Tensor, *shard: Any, **named: Any) -> None:
            loader(place, Piece.of(loaded_weight), *shard, **named)

        weight: Any = nn.Parameter(torch.empty(0, dtype=torch.uint8), requires_grad=False)
        weight.weight_loader, weight.output_dim, weight.input_dim = load, 0, 1
        layer.register_parameter("weight", weight)
        layer.packed_place, layer.packed_parts = place, []

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the pieces together as parameters; ValueError if some of the rows were not loaded."""
        place: Place = layer.packed_place
        if layer.packed_parts and not place.found:
            return  # it was done before
        device, layer.packed_parts = layer.weight.device, []
        for number, part in enumerate(place.parts()):
            name = f"weight_{number}" if number else "weight"
            data, layout = (part.data, part.layout) if isinstance(part, Packed) else (part, None)
            layer.register_parameter(name, nn.Parameter(data.to(device), requires_grad=False))
            layer.packed_parts.append((name, layout))
        place.found.clear()

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., columns] times the matrices of the layer, side by side."""
        parts = layer.packed_parts
        if len(parts) == 1:
            return _product(x, getattr(layer, parts[0][0]), parts[0][1], bias)
        y = torch.cat([_product(x, getattr(layer, name), layout, None) for name, layout in parts], -1)
        return y if bias is None else y + bias


def _product(x: Tensor, weight: Tensor, layout: PackedLayout | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias) if layout is None else packed_matmul(x, Packed(weight, layout), bias)


class Unpacking:
    """For a method of vLLM that knows dense matrices alone: packed ones are unpacked as they are read."""

    def create_weights(self, layer: Any, *sizes: Any, **attributes: Any) -> None:
        """As that of the method, with another loader."""
        loader: Callable[..., Any] | None = attributes.get("weight_loader")

        # vLLM's models give these two arguments by their places or by these names.
        def load(param: nn.Parameter, loaded_weight: Tensor, *rest: Any, **named: Any) -> Any:
            assert loader is not None
            if is_packed(loaded_weight):
                name = getattr(layer, "layer_name", "") or type(layer).__name__
                warnings.warn(f"{name}: unpacked while loading, for no packed layer stands for it", stacklevel=2)
                loaded_weight = unpack(Packed.from_tensor(loaded_weight))
            return loader(param, loaded_weight, *rest, **named)

        if loader is not None:
            attributes["weight_loader"] = load
        super().create_weights(layer, *sizes, **attributes)  # type: ignore[misc]
