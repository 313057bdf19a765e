"""Linear layers and mixtures of experts that keep their matrices packed, in the place of transformers' own."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rac_kernels import Packed, PackedLayout, packed_matmul


@dataclass(frozen=True)
class PackedSize:
    """A packed matrix of a file, of which the header has been read alone."""

    layout: PackedLayout
    size: int
    """Bytes of the tensor."""

    def parameter(self) -> nn.Parameter:
        """A place for it in a model: uint8 [bytes] on the meta device."""
        return nn.Parameter(torch.empty(self.size, dtype=torch.uint8, device="meta"), requires_grad=False)


def taken(weight: nn.Parameter) -> tuple[nn.Parameter, PackedLayout]:
    """A parameter that was loaded, once `Packed.from_tensor` finds it whole, and its layout.

    Raises ValueError, one line, if it is not.
    """
    packed = Packed.from_tensor(weight.detach())
    if packed.data.data_ptr() != weight.data_ptr():  # it did not lie at a multiple of 8 bytes
        weight = nn.Parameter(packed.data, requires_grad=False)
    return weight, packed.layout


class PackedLinear(nn.Module):
    """y = x Wᵀ + b with W packed: `weight` is uint8 [bytes], the tensor on disk."""

    def __init__(self, packed: PackedSize, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.layout.shape
        self.layout = packed.layout
        self.weight = packed.parameter()
        self.bias = bias

    def take(self) -> None:
        """Check the matrix, now that it has been loaded; ValueError if it is damaged."""
        weight, layout = taken(self.weight)
        if layout.shape != self.layout.shape:
            raise ValueError(f"it is {list(layout.shape)}, and the layer {list(self.layout.shape)}")
        self.weight, self.layout = weight, layout

    def forward(self, x: Tensor) -> Tensor:
        return packed_matmul(x, Packed(self.weight, self.layout), self.bias)

    def extra_repr(self) -> str:
        layout = self.layout
        kept = layout.kept / max(layout.rows * layout.columns, 1)
        return f"{self.in_features}, {self.out_features}, values={layout.values}, kept={kept:.3f}"


def is_mixture(module: nn.Module) -> bool:
    """Whether transformers' module holds the experts of a mixture in the way that `PackedExperts` takes over.

    Their matrices are stacked, [experts, rows, columns], without biases; gate and up are one, with gate's rows first.
    """
    told = {name: getattr(module, name, None) for name in ("is_transposed", "has_bias", "has_gate", "is_concatenated")}
    if None in told.values() or told["is_transposed"] or told["has_bias"]:
        return False
    return not told["has_gate"] or bool(told["is_concatenated"])


class PackedExperts(nn.Module):
    """A mixture of experts with packed matrices, in the place of transformers' own.

    Matrices that are stacked on disk are packed batches, under the names that transformers has for them. Where each
    expert has its own on disk, so it has here: the children "0", "1", … hold them under their names on disk, packed or
    dense.
    """

    def __init__(self, fused: Any, entrance: Sequence[str], exit_: str) -> None:
        """Take over from `fused`, the matrices apart.

        entrance: names of the matrices that an expert's input goes into, in the order of their rows, and `exit_` of the
        last one: of a module of each expert, or, if the mixture has a parameter of that name, of that.
        """
        super().__init__()
        self.num_experts: int
        self.has_gate: bool
        self.has_post_expert_norm: bool
        self.act_fn: Any
        self.post_expert_norm: Any
        for name, value in vars(fused).items():
            if name not in self.__dict__:
                setattr(self, name, value)
        for name, child in fused.named_children():
            self.add_module(name, child)  # the activation, if it is a module
        if self.has_gate:
            self._apply_gate = types.MethodType(type(fused)._apply_gate, self)
        self.entrance, self.exit = tuple(entrance), exit_
        self.layouts: dict[str, PackedLayout] = {}
        """Of packed batches, by name."""

    def stack(self, name: str, packed: PackedSize) -> None:
        """Give it the matrices of all experts as a packed batch."""
        self.register_parameter(name, packed.parameter())
        self.layouts[name] = packed.layout

    def own(self, expert: int, name: str, layer: nn.Module) -> None:
        """Give an expert a matrix of its own."""
        if str(expert) not in self._modules:
            self.add_module(str(expert), nn.Module())
        self.get_submodule(str(expert)).add_module(name, layer)

    def take(self) -> None:
        """Check packed batches, now that they have been loaded; ValueError if one is damaged."""
        for name, expected in self.layouts.items():
            weight, layout = taken(self.get_parameter(name))
            if layout.shape != expected.shape:
                raise ValueError(f"it is {list(layout.shape)}, and the experts' {list(expected.shape)}")
            self.register_parameter(name, weight)
            self.layouts[name] = layout

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Outputs of the chosen experts, weighed and added up.

        hidden_states: [tokens, n]; top_k_index: [tokens, k] numbers of experts, those beyond the last are passed over;
        top_k_weights: [tokens, k].
        """
        tokens, k = top_k_index.shape
        sums = torch.zeros(tokens, hidden_states.shape[1], dtype=torch.float32, device=hidden_states.device)
        slots = top_k_index.reshape(-1)
        order = slots.argsort(stable=True)
        weights = top_k_weights.reshape(-1, 1)
        begin = 0
        for expert, count in enumerate(slots.bincount(minlength=self.num_experts).tolist()[: self.num_experts]):
            if not count:
                continue
            chosen = order[begin : begin + count]
            begin += count
            rows = chosen // k
            inner = self._entered(expert, hidden_states[rows] if tokens > 1 else hidden_states)
            inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
            y = self._product(expert, self.exit, inner)
            if self.has_post_expert_norm:
                y = self.post_expert_norm(y)
            sums.index_add_(0, rows, (y * weights[chosen]).float())
        return sums.to(hidden_states.dtype)

    def _entered(self, expert: int, x: Tensor) -> Tensor:
        outputs = [self._product(expert, name, x) for name in self.entrance]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def _product(self, expert: int, name: str, x: Tensor) -> Tensor:
        """x [m, columns] times a matrix of an expert."""
        stacked = self._parameters.get(name)
        if stacked is None:
            own: Any = self._modules[str(expert)]
            y: Tensor = own._modules[name](x)
            return y
        if (layout := self.layouts.get(name)) is not None:
            return packed_matmul(x, Packed(stacked, layout), matrix=expert)
        return nn.functional.linear(x, stacked[expert])
